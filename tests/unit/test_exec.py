"""Who a command of `exec` is, in a sandbox whose own command is not root."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from worker.bundle import CAPABILITIES, capabilities_of
from worker.calls import make_call
from worker.errors import SandbatchError
from worker.exec import make_process

OWN = {
    "args": ["server"],
    "user": {"uid": 1000, "gid": 1001, "additionalGids": [5]},
    "env": ["PATH=/bin", "COLOUR=red"],
    "cwd": "/srv",
    "noNewPrivileges": True,
    "capabilities": capabilities_of(1000),
}


@pytest.fixture
def process(tmp_path):
    """What `exec` with these options hands to runsc."""
    (tmp_path / "config.json").write_text(json.dumps({"process": OWN}))

    def make(**fields: Any) -> dict[str, Any]:
        call = make_call("exec", call_id="0" * 32, container_id="sb-00000000000000e1", args=["id"], **fields)
        return make_process(SimpleNamespace(bundle=tmp_path, container_id="sb-00000000000000e1"), call)

    return make


def test_it_is_the_user_of_the_sandbox_where_and_as_its_command_is(process):
    assert process() == {**OWN, "args": ["id"]}


def test_what_is_given_counts_before_that(process):
    made = process(env={"COLOUR": "two words"}, cwd="/")
    assert made["env"][-1] == "COLOUR=two words"
    assert (made["cwd"], made["user"]) == ("/", OWN["user"])


def test_root_has_roots_capabilities_whoever_the_sandbox_runs_as(process):
    made = process(user="0")
    assert made["user"] == {"uid": 0, "gid": 0}
    assert made["capabilities"]["effective"] == list(CAPABILITIES)
    assert made["noNewPrivileges"] is True


def test_another_user_has_no_capabilities(process):
    made = process(user="7:8")
    assert made["user"] == {"uid": 7, "gid": 8}
    assert set(made["capabilities"]) == {"bounding"}


def test_a_bundle_that_has_just_gone_is_told_in_words(process, tmp_path):
    (tmp_path / "config.json").unlink()
    with pytest.raises(SandbatchError, match="has ended"):
        process()
