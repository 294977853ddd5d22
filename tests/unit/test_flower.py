"""What must be so before Flower starts: nobody but this machine reaches it without a password."""

import os
import socket
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from cli.flower import FIXED, flower_argv, is_loopback
from worker.errors import BadInput, CniPluginError, RunscError


@pytest.fixture(autouse=True)
def _no_settings_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FLOWER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_only_this_machine_reaches_these(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::", "10.0.0.1", "build-7", "127.0.0.1.example"])
def test_others_reach_these_and_so_they_need_a_password(address: str, free: int) -> None:
    """An empty address is all of them: so Flower takes it."""
    assert not is_loopback(address)
    with pytest.raises(BadInput, match="set FLOWER_BASIC_AUTH=USER:PASSWORD"):
        flower_argv(free, address)


def test_with_a_password_it_is_opened_to_others(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "alice:a1,bob:b2")
    argv = flower_argv(free, "0.0.0.0")
    assert "--address=0.0.0.0" in argv
    assert "a1" not in " ".join(argv), "every user of the machine sees what stands here"


@pytest.mark.parametrize("given", ["", ":", "alice", "alice:", ":a1", "alice:a1,", "alice:a1,:", "älice:a1"])
def test_what_is_no_password_is_refused(given: str, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Flower takes `:` as a login without name and password, and an umlaut makes every answer an error."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", given)
    with pytest.raises(BadInput, match="FLOWER_BASIC_AUTH"):
        flower_argv(free, "0.0.0.0")


@pytest.mark.parametrize("name", ["FLOWER_UNIX_SOCKET", "FLOWER_UNAUTHENTICATED_API", "FLOWER_CONF"])
def test_other_ways_to_open_it_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match=name):
        flower_argv(free, "127.0.0.1")


def test_oauth_alone_is_no_password(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setenv("FLOWER_AUTH", ".*@example.com")
    with pytest.raises(BadInput, match="FLOWER_BASIC_AUTH"):
        flower_argv(free, "0.0.0.0")


def test_a_port_that_is_taken_is_told_before_anything_starts(taken: int) -> None:
    with pytest.raises(BadInput, match=f"port {taken}: .*Address already in use; choose another --port"):
        flower_argv(taken, "127.0.0.1")


def test_an_address_of_another_machine_is_told_as_well(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "alice:a1")
    with pytest.raises(BadInput, match=r"192\.0\.2\.1, port"):
        flower_argv(free, "192.0.2.1")


def test_the_environment_chooses_what_opens_nothing(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """What must stay stands on the command line, which wins over the environment."""
    monkeypatch.setenv("FLOWER_TASKS_COLUMNS", "name,args")
    monkeypatch.setenv("FLOWER_READ_ONLY", "false")
    argv = flower_argv(free, "127.0.0.1")
    assert not any(word.startswith("--tasks_columns") for word in argv)
    assert argv[-len(FIXED) :] == list(FIXED)
    assert "--read_only=true" in FIXED


def test_flower_knows_every_option_that_we_fix() -> None:
    """It ignores what it does not know: a new name would open what we mean to close."""
    from flower import options  # a part of Flower that starts nothing

    known = options.default_options.as_dict()
    assert {word[2:].partition("=")[0] for word in FIXED} <= set(known), version("flower")


def test_a_failed_task_is_shown_in_words() -> None:
    """Flower shows the repr of what a task raised."""
    assert repr(CniPluginError("ADD", "bridge", "sb-1", 7, "no such moon")).startswith(
        "CNI ADD by plugin bridge for sb-1: no such moon (code 7)"
    )
    assert (
        repr(RunscError("runsc start sb-1", "no such file", "look")) == "runsc start sb-1: no such file; look"
    )
