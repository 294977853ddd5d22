"""An error crosses processes: the pool's pickle, and Celery's rebuilding from its args."""

import pickle

import pytest
from celery.utils.serialization import get_pickleable_exception

from worker import errors
from worker.errors import CniPluginError, SandbatchError


def subclasses(of: type[SandbatchError]) -> list[type[SandbatchError]]:
    return [of, *(found for one in of.__subclasses__() for found in subclasses(one))]


PLAIN = [one for one in subclasses(SandbatchError) if one is not CniPluginError]
ALL = [
    *(one("the thing", "is broken", "mend it") for one in PLAIN),
    CniPluginError("ADD", "bridge", "sb-0123456789abcdef", 11, "no address"),
    CniPluginError("VERSION", "bridge", "", 7, "no"),
]


def test_every_class_of_the_module_is_among_them():
    """A class that somebody adds is tested without a change here."""
    theirs = {one for one in vars(errors).values() if isinstance(one, type)}
    assert theirs <= {type(one) for one in ALL}, "other modules have some, too, where they are loaded"


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_pickle_and_after_celery(error):
    """Else the worker logs an UnpickleableExceptionWrapper in place of the words."""
    rebuilt = [pickle.loads(pickle.dumps(error)), type(error)(*error.args), get_pickleable_exception(error)]  # noqa: S301
    for other in rebuilt:
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert (other.args, other.can_pass, other.exit_code) == (error.args, error.can_pass, error.exit_code)


@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make.__name__)
def test_an_error_says_what_why_and_what_to_do(make):
    assert str(make("the thing", "is broken", "mend it")) == "the thing: is broken; mend it"
    assert str(make("the thing", "is broken")) == "the thing: is broken"


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_what_why_and_todo_can_be_asked_of_every_error(error):
    """`doctor` and others put the parts into columns of their own."""
    assert error.what
    assert error.why
    assert error.todo
    assert error.why in str(error)


def test_an_error_of_a_plugin_has_its_words_code_and_advice():
    error = CniPluginError("ADD", "bridge", "sb-0123456789abcdef", 11, "no address")
    assert str(error) == (
        "CNI ADD by plugin bridge for sb-0123456789abcdef: no address (code 11); try again later"
    )
    assert "for" not in str(CniPluginError("VERSION", "bridge", "", 7, "no")).split(":")[0]


def test_misuse_is_2_and_what_failed_is_1():
    codes = {one.__name__: one("a", "b").exit_code for one in PLAIN}
    assert {name for name, code in codes.items() if code == 2} == {"BadInput", "BadNetwork"}
    assert set(codes.values()) == {1, 2}


def test_only_what_can_pass_is_tried_again():
    """A retry of anything else costs a slot for nothing."""
    passing = {type(one).__name__ for one in ALL if one.can_pass}
    assert passing == {"Busy", "BrokerError", "CniPluginError"}
    assert not CniPluginError("ADD", "bridge", "x", 7, "no").can_pass
