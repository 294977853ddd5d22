"""`run --dry-run` against a real launch of the same spec: the same words, and nothing touched."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.host.machine import difference, snapshot
from tests.host.system import System
from worker import egress, journal, procs
from worker.dryrun import CONTAINER_ID, PREV_RESULT
from worker.egress_rules import load_text, ruleset

# A bridge plugin that records what it is called with.
RECORDER = """#!/bin/sh
here=$(dirname "$0")
cat > "$here/bridge.stdin.$CNI_COMMAND"
env | grep ^CNI_ > "$here/bridge.env.$CNI_COMMAND"
for folder in /opt/cni/bin /usr/lib/cni; do
  [ -x $folder/bridge ] && exec $folder/bridge < "$here/bridge.stdin.$CNI_COMMAND"
done
"""


@pytest.fixture
def fresh(make_system):
    """A host on which nothing has ever run, with a network of two plugins that record their calls."""
    system = make_system()
    (system.folder / "allowed").mkdir()
    system.env["SANDBATCH_MOUNT_ALLOW"] = json.dumps([str(system.folder / "allowed")])
    system.network("chained", chain=("faulty",))
    system.faulty_plugin("")
    (system.plugins / "bridge").write_text(RECORDER)
    (system.plugins / "bridge").chmod(0o755)
    return system


def options_of(system: System) -> list[str]:
    return [
        *("--network", "chained", "--env", "A=1", "-v", f"{system.folder}/allowed:/data", "--tmpfs", "/w"),
        *("--writable", "memory", "--pids", "50", "--egress", "10.0.0.0/8:443", "--isolate"),
        *("--", "sleep", "1000"),
    ]


def everything(folder: Path) -> list[str]:
    """All files with their times, so that a file that was written and removed shows in its folder's."""
    found = [folder, *folder.rglob("*")]
    return sorted(f"{path} {path.lstat().st_mtime_ns} {path.lstat().st_size}" for path in found)


def test_a_dry_run_says_what_a_launch_does_and_touches_nothing(fresh: System):
    options = options_of(fresh)
    files, machine = everything(fresh.folder), snapshot()
    said: dict[str, Any] = json.loads(fresh.cli("run", "--dry-run", "--json", *options).stdout)
    for_people = fresh.cli("run", "--dry-run", *options).stdout
    assert everything(fresh.folder) == files
    assert difference(machine, snapshot()) == {}

    fresh.start()
    [container_id] = fresh.run("--wait", *options)

    def as_launched(document: Any) -> Any:
        return json.loads(json.dumps(document).replace(CONTAINER_ID, container_id))

    folder = fresh.sandboxes / container_id
    config = json.loads((folder / "bundle/config.json").read_text())
    for document in (said["config"], config):
        assert ("A=1" in document["process"]["env"]) == (document is config)  # it may be a secret
        document["process"]["env"] = [one for one in document["process"]["env"] if one[:2] != "A="]
    assert as_launched(said["config"]) == config
    assert "A=(as asked for)" in for_people
    assert Path(config["root"]["path"]).is_dir()  # which the dry run has named, not made

    first, second = (as_launched(call) for call in said["cni"])
    assert first["stdin"] == json.loads((fresh.plugins / "bridge.stdin.ADD").read_text())
    env = dict(line.split("=", 1) for line in (fresh.plugins / "bridge.env.ADD").read_text().splitlines())
    assert first["env"] == env
    recorded = json.loads((fresh.plugins / "stdin.ADD").read_text())
    assert second["stdin"] == {**recorded, "prevResult": PREV_RESULT}
    assert [call["plugin"] for call in (first, second)] == ["bridge", "faulty"]

    known = journal.read(folder)
    [link] = egress.journaled(known)
    text = load_text(ruleset(container_id, [link], known.spec.egress, known.spec.isolate))
    assert without_names(as_launched(said["firewall"]), said["unknown"].values()) == without_names(
        text, [link.host_end, link.mac, *link.addresses]
    )

    [conmon] = [
        one for one in procs.processes_of(fresh.run_dir / "runsc", container_id) if one.role == "conmon"
    ]
    assert "/etc/resolv.conf" in said["unknown"]  # the network's result names no server
    argv = Path(f"/proc/{conmon.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    create, start = as_launched(said["runsc"])
    handle = re.compile(r"/proc/\d+/fd/\d+$")
    assert [handle.sub(said["unknown"]["mount namespace"], one) for one in argv] == create
    assert start[-2:] == ["start", container_id]
    for words in (
        *("# config.json", "# CNI ADD by plugin bridge: network chained, eth0", "CNI_COMMAND=ADD"),
        *("# firewall", said["firewall"].splitlines()[0], f"prevResult: {PREV_RESULT}"),
    ):
        assert words in for_people


def without_names(text: str, names: Any) -> str:
    """The rules without what only a launch knows: a link's names and its address."""
    for name in names:
        for one in filter(None, (name, name.partition("/")[0])):
            text = text.replace(one, "?")
    return text


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["-v", "/etc:/data"], {}, "not below an allowed folder"),
        (["--network", "nothing"], {}, "network nothing"),
        ([], {"SANDBATCH_RUNSC": "/no/runsc"}, "/no/runsc: no such program; run sandbatch setup"),
        ([], {"SANDBATCH_CNI_PATH": "/nowhere"}, "CNI plugin bridge: not found in /nowhere"),
    ],
)
def test_what_a_launch_would_be_refused_for_is_said(fresh: System, options, env, words):
    files = everything(fresh.folder)
    fresh.env |= env
    done = fresh.cli("run", "--dry-run", *options, "--", "true", check=False)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stdout == ""
    assert everything(fresh.folder) == files
