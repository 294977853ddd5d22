"""Who a command of `exec` is, in a sandbox whose own command is not root."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worker.bundle import CAPABILITIES, capabilities_of
from worker.calls import make_call
from worker.errors import BadInput, SandbatchError
from worker.exec_process import make_process
from worker.spec import make_spec

OWN = {
    "args": ["server"],
    "user": {"uid": 1000, "gid": 1001, "additionalGids": [5]},
    "env": ["PATH=/bin", "COLOUR=red", "HOME=/home/app"],
    "cwd": "/srv",
    "noNewPrivileges": True,
    "capabilities": capabilities_of(1000),
}


@pytest.fixture
def root(tmp_path) -> Path:
    """The root of the sandbox's image."""
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text("root:x:0:0::/root:\napp:x:1000:1001::/home/app:\n")
    (tmp_path / "root/etc/group").write_text("logs:x:5:app\n")
    return tmp_path / "root"


@pytest.fixture
def process(tmp_path, root) -> Callable[..., dict[str, Any]]:
    """What `exec` with these options hands to runsc; `image`: the sandbox has one."""
    (tmp_path / "config.json").write_text(json.dumps({"process": OWN}))

    def make(*, image: str | None = None, **fields: Any) -> dict[str, Any]:
        spec = make_spec(args=["server"], image=image)
        spec = spec.model_copy(update={"rootfs": str(root), "user": "1000:1001"} if image else {})
        known = SimpleNamespace(bundle=tmp_path, container_id="sb-00000000000000e1", spec=spec)
        call = make_call("exec", call_id="0" * 32, container_id=known.container_id, args=["id"], **fields)
        return make_process(known, call)

    return make


def test_it_is_the_user_of_the_sandbox_where_and_as_its_command_is(process):
    assert process() == process(image="busybox") == {**OWN, "args": ["id"]}


def test_what_is_given_counts_before_that(process):
    made = process(env={"COLOUR": "two words"}, cwd="/")
    assert made["env"] == ["PATH=/bin", "COLOUR=two words", "HOME=/home/app"]
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


def test_a_name_is_one_of_the_image_and_brings_its_groups_and_its_home(process):
    made = process(image="busybox", user="root")
    assert made["user"] == {"uid": 0, "gid": 0}
    assert "HOME=/root" in made["env"]
    made = process(image="busybox", user="app", env={"HOME": "/mine"})
    assert made["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [5]}
    assert "HOME=/mine" in made["env"]
    with pytest.raises(SandbatchError, match="is not in the image's /etc/passwd"):
        process(image="busybox", user="nobody")


def test_without_an_image_a_user_is_a_number(process):
    with pytest.raises(SandbatchError, match="numbers are needed"):
        process(user="app")
    with pytest.raises(BadInput, match="user"):
        process(user="a:b:c")
