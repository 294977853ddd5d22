"""A short run of the fuzzer with a fixed seed, and values as hypothesis makes them."""

import json
import logging
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.run import runs
from tests.fuzz.targets import TARGETS, Target
from worker import cni_cache, journal
from worker.errors import BadInput
from worker.settings import Settings
from worker.spec import Spec, make_spec

RUNS = 120
SLOW = {"one_journal": 60}  # each starts a worker's look at the whole machine
fixed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TEXT = st.text(max_size=12)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "cwd": st.sampled_from(["/", "/a/../b", "../x", "/a//b", "/a\0", ""]),
    "rootfs": st.sampled_from(["host", "/srv/../etc", "/srv/a", "srv", "/", "/.."]),
    "labels": st.dictionaries(TEXT, TEXT, max_size=3),
    "env": st.dictionaries(st.text(string.ascii_letters + "=_", max_size=4), TEXT, max_size=3),
    "ready": st.from_regex(r"(tcp|http):[0-9]{0,7}(/[a-z]*)?", fullmatch=True),
    "user": st.from_regex(r"[0-9a-z²:]{0,12}", fullmatch=True),
    "image": TEXT | st.just("a/b:1") | st.just("oci:/a/../b"),
    "memory_bytes": st.integers(),
    "ttl_s": st.floats(),
    "egress": st.lists(st.from_regex(r"[0-9.:/\[\]a-f-]{0,20}", fullmatch=True), max_size=2),
    "deadline_at": st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{5,8}(Z|[+-][0-9:]{5})", fullmatch=True),
}


@pytest.fixture(autouse=True)
def quiet():
    """Of hundreds of refusals nobody reads a line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_no_reader_fails_on_changed_bytes_or_leaves_its_folder(target: Target):
    found = [
        f"{one.where}: {one.words} {one.data[:300]!r}" for one in runs(target, 1, SLOW.get(target.name, RUNS))
    ]
    assert not found, "python -m tests.fuzz finds the others of its kind: " + "\n".join(found[:3])


def test_a_reader_that_fails_or_writes_outside_is_found(tmp_path):
    """So that a fuzzer that finds nothing has looked."""

    def reader(data: bytes, folder: Path) -> None:
        if b"x" in data:
            raise KeyError("x")
        (folder / "../outside/kept").write_bytes(data)

    found = list(runs(Target(lambda: [b"x", b"ok"], reader), 1, 0))
    assert [one.where.split(":")[0] for one in found] == ["KeyError at test_seeded.py", "outside"]


@fixed
@given(fields=st.fixed_dictionaries({"args": st.lists(TEXT, max_size=3)}, optional={**LIKELY}))
def test_a_spec_is_refused_in_words_or_comes_back_as_it_was(fields: dict[str, Any]):
    targets.spec(json.dumps(fields).encode(), Path())
    try:
        made = make_spec(**fields)
    except BadInput:
        return
    assert Spec.model_validate_json(made.model_dump_json()) == made


@fixed
@given(value=ANY, name=st.sampled_from([name for name in Spec.model_fields if name != "args"]))
def test_no_value_of_a_field_is_more_than_refused(value: Any, name: str):
    targets.spec(json.dumps({"args": ["a"], name: value}).encode(), Path())


@fixed
@given(value=ANY)
def test_no_json_is_more_than_refused_by_who_takes_messages(value: Any):
    data = json.dumps(value).encode()
    for take in (targets.order, targets.call, targets.entry, targets.message, targets.record, targets.token):
        take(data, Path())


@fixed
@given(
    events=st.lists(
        st.dictionaries(st.sampled_from(["seq", "t", "event", "stage", "facts"]), ANY), max_size=3
    )
)
def test_a_journal_with_events_of_nobody_is_set_aside(events: list[dict[str, Any]]):
    with TemporaryDirectory() as place:
        own = Settings(state_dir=Path(place), run_dir=Path(place))
        known = journal.create(
            own.sandboxes_dir, targets.ID, attempt=1, batch="b", spec=make_spec(args=["a"])
        )
        with (known.folder / journal.FILE).open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in events)
        journals, errors = journal.read_all(own.sandboxes_dir)
        assert len(journals) + len(errors) == 1
        assert all(error.kind for error in errors)


@fixed
@given(network=TEXT, container_id=TEXT, if_name=TEXT)
def test_no_name_leads_a_cache_entry_out_of_its_folder(network: str, container_id: str, if_name: str):
    path = cni_cache.entry_path(Path("/cache"), network, container_id, if_name)
    assert path.parent == Path("/cache/results")
    assert path.name not in ("", ".", "..")
