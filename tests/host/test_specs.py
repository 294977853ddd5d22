"""What stands in the record is judged again on the host: nothing is made of what somebody wrote by hand."""

import json
import stat
from typing import Any

import pytest

from tasks.keys import line_key, sandbox_key, sealed_key
from tests.host.system import System
from worker.spec import make_spec

SECRET = "hunter2-in-the-environment"
OUTSIDE = "sb-../../../../escaped"


def test_values_reach_the_program_and_are_nowhere_to_be_read(clean_system: System) -> None:
    (one,) = clean_system.run("--wait", "--env", f"TOKEN={SECRET}", "--", "sleep", "600")
    assert clean_system.cli("exec", one, "--", "sh", "-c", "echo $TOKEN").stdout == f"{SECRET}\n"
    (other,) = clean_system.run("--env", f"TOKEN={SECRET}", "--", "sh", "-c", "exit ${#TOKEN}")
    assert clean_system.wait([other], "terminal") == {other: "exited"}
    assert clean_system.show(other)["exit_code"] == len(SECRET)
    shown = [clean_system.cli(*words, "--json").stdout for words in (["show", one], ["ls"], ["show", other])]
    with clean_system.record() as record:
        events = json.dumps(record.client.xrange("sandbatch:events"))
        assert (record.get(one) or {})["spec"]["env"] == {"TOKEN": None}
        assert record.client.exists(sealed_key(one))
        assert not record.client.exists(sealed_key(other))
    assert SECRET not in "".join([*shown, events, clean_system.log()])
    folder = clean_system.sandboxes / one
    holders = [
        path for path in folder.rglob("*") if path.is_file() and SECRET in path.read_text("utf-8", "replace")
    ]
    assert {path.name for path in holders} == {"journal.jsonl", "config.json"}
    for path in (*holders, folder, folder / "bundle"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.fixture
def drained(clean_system: System) -> Any:
    """A host that takes nothing until what waits for it has been edited."""
    clean_system.cli("drain", "test")
    yield clean_system
    clean_system.cli("resume", "test")


EDITS: dict[str, dict[str, Any]] = {
    "rootfs": {"rootfs": "/root"},
    "mounts": {"mounts": [{"type": "bind", "source": "/root", "target": "/data"}]},
    "unknown": {"privileged": True},
    "huge": {"args": ["sh", "-c", "true" + " " * 3_000_000]},
    "memory": {"memory_bytes": 2**80},
    "command": {"args": []},
    "program": {"args": ["a\0b"]},
    "env": {"kind": "spec/v1", "env": {"A=B": SECRET}},
    "values": {"kind": "spec/v4", "env": {"TOKEN": None}},
    "network": {"networks": [{"name": "../../etc/passwd"}]},
    "host": {"host": "another"},
    "labels": {"on": {"gpu": "true"}},
    "kind": {"kind": "spec/v9"},
}


def test_what_was_edited_in_the_record_is_refused_and_nothing_is_made(drained: System) -> None:
    (batch_of, *_) = ids = drained.run("--count", str(len(EDITS) + 1), "--", "sleep", "600")
    with drained.record() as record:
        for one, change in zip(ids[1:], EDITS.values(), strict=True):
            key = sandbox_key(one)
            fields = json.loads(str(record.client.hget(key, "spec")))
            record.client.hset(key, "spec", json.dumps({**fields, **change}))
        whole = record.client.hgetall(sandbox_key(batch_of))
        record.client.hset(sandbox_key(OUTSIDE), mapping={**whole, "id": OUTSIDE})
        record.client.zadd(line_key(whole["line"]), {OUTSIDE: 0.0})
        record.client.hset(sandbox_key(ids[0]), "spec", "[" * 100_000)
    drained.cli("resume", "test")
    states = drained.wait(ids, "terminal")
    assert set(states.values()) == {"failed"}, states
    with drained.record() as record:
        rows = {row["id"]: row for row in record.get_all(ids)}
    for name, one in zip(EDITS, ids[1:], strict=True):
        error = rows[one]["error"]
        assert error["message"], name
        if name in ("rootfs", "mounts"):  # what the host allows is looked up when it is used
            assert error["stage"] == "bundle", name
        else:
            assert (error["stage"], rows[one]["reason"]) == ("place", "refused"), name
        assert SECRET not in json.dumps(error)
    assert "rootfs" in rows[ids[1]]["error"]["message"]
    assert "privileged" in rows[ids[3]]["error"]["message"]
    assert SECRET not in drained.log()
    assert not (drained.sandboxes.parents[3] / "escaped").exists()
    assert not list(drained.sandboxes.glob("*"))
    assert drained.audit() == []
    # The host goes on: neither its puller nor its sweep stumbles over what it cannot read.
    assert drained.run("--wait", "--", "sleep", "600")


def test_a_spec_of_release_0_1_0_with_its_values_in_the_record_is_launched(drained: System) -> None:
    (one,) = drained.run("--", "sh", "-c", "sleep 600")
    spec = make_spec(args=["sleep", "600"], env={"TOKEN": SECRET}, network="bridged")
    with drained.record() as record:
        record.client.hset(sandbox_key(one), "spec", spec.model_dump_json())
    drained.cli("resume", "test")
    assert drained.wait([one], "running") == {one: "running"}
    assert drained.cli("exec", one, "--", "printenv", "TOKEN").stdout == f"{SECRET}\n"
    assert SECRET not in drained.cli("show", one, "--json").stdout
