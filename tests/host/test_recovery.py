"""A reboot, a full disk, an undo that keeps failing: nothing left, nothing held back, and it is said."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.system import SERVER, System
from worker import procs

STUCK_S = 60.0


def reboot(system: System, *, rules_stay: bool) -> None:
    """What a reboot does: processes, netns, links, /run are gone; leases and journals are not."""
    assert system.process is not None
    os.kill(system.worker_pid(), signal.SIGKILL)
    system.wait_for_end()
    root = system.run_dir / "runsc"
    for proc in sorted(procs.all_sandbox_processes(root), key=lambda one: one.role != "conmon"):
        os.kill(proc.pid, signal.SIGKILL)
    system.wait_until(lambda: not procs.all_sandbox_processes(root), 10, "end of the processes")
    for folder in system.sandboxes.iterdir():
        subprocess.run(["ip", "netns", "del", folder.name], check=True)
        journal = folder / "journal.jsonl"
        head, _, rest = journal.read_text().partition("\n")
        other = json.dumps({**json.loads(head), "boot_id": "00000000-0000-0000-0000-000000000000"})
        journal.write_text(other + "\n" + rest)
    subprocess.run(["ip", "link", "del", system.bridge], check=True)
    if not rules_stay:
        for chain in ("-F", "-X"):
            subprocess.run(["iptables", "-t", "nat", chain], check=True)
    shutil.rmtree(system.run_dir)


@pytest.mark.parametrize("rules_stay", [True, False])
def test_after_a_reboot_the_sandboxes_have_failed_and_nothing_is_left(make_system, rules_stay: bool):
    """Leases outlive a reboot, and firewall rules where something restores them: both need a DEL."""
    if (
        not rules_stay
        and subprocess.run(
            ["iptables", "-t", "nat", "-S", "POSTROUTING"], check=True, capture_output=True, text=True
        ).stdout.count("\n")
        > 1
    ):
        rules_stay = True  # others have rules here: theirs are not flushed for a test
    system: System = make_system()
    system.start()
    ids = system.run("--count", "2", "--wait", *SERVER)

    reboot(system, rules_stay=rules_stay)
    system.start()

    assert system.wait(ids, "terminal", 15) == dict.fromkeys(ids, "failed")
    assert {system.show(one)["error"]["message"] for one in ids} == {"host rebooted"}
    assert system.audit() == []
    leases = system.folder / "cni" / "networks" / "bridged"
    assert [path.name for path in leases.iterdir() if path.name[0].isdigit()] == []


def test_an_undo_that_keeps_failing_is_stuck_and_holds_nothing_back(make_system):
    """It is seen in ls, show and audit; others come and go; once it can work, it does."""
    system: System = make_system()
    system.faulty_plugin("DEL exit1")
    base = system.subnet.removesuffix(".0/24")  # leases are kept by network: keep the two apart
    system.network("faulty", chain=("faulty",), rangeStart=f"{base}.100")
    system.start()
    (stuck,) = system.run("--network", "faulty", "--wait", *SERVER)

    done = system.cli("rm", stuck, check=False)

    assert done.returncode == 1
    assert f"{stuck} stuck" in done.stderr
    assert system.ls()[stuck]["state"] == "stuck"
    undo = system.show(stuck)["stages"][-1]
    assert (undo["name"], undo["do|undo"], undo["state"]) == ("network", "undo", "failed")
    assert "no such moon" in undo["error"]
    assert f"stuck sandbox {stuck}" in system.audit()
    (other,) = system.run("--wait", *SERVER)
    system.cli("rm", other)

    (system.plugins / "mode").write_text("")
    assert system.wait([stuck], "terminal", STUCK_S) == {stuck: "exited"}
    assert system.audit() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that a test may fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_begins_no_launch_and_says_so(make_system, small_disk: Path):
    """What cannot be journaled is not begun; the host shows why; with room it goes on."""
    system: System = make_system(SANDBATCH_STATE_DIR=str(small_disk))
    system.start()
    try:
        filler = small_disk / "filler"
        with filler.open("wb") as out:
            out.write(b"\0" * (50 << 20))  # less than 64 MiB are left: the gate closes

        def host() -> dict[str, str]:
            return dict(json.loads(system.cli("hosts", "--json").stdout)[0])

        system.wait_until(lambda: "64 MiB left" in host()["not_ready"], 15, "word of the full disk")
        (waiting,) = system.run(*SERVER)
        system.wait_until(lambda: "takes no new sandboxes" in system.log(), 10, "the closed gate")
        assert system.ls()[waiting]["state"] == "queued"
        assert not (small_disk / "sandboxes" / waiting).exists()

        filler.unlink()
        assert system.wait([waiting], "running", 30) == {waiting: "running"}
        system.cli("rm", waiting)
        assert system.audit() == []
    finally:
        system.stop()


def test_a_journal_that_cannot_be_written_fails_the_sandbox(make_system):
    """The disk may fill between the look and the write: nothing is begun, and the record says why."""
    system: System = make_system(
        SANDBATCH_FAULTS="journal.begun.network.before:enospc", SANDBATCH_ALLOW_FAULTS="1"
    )
    system.start()
    (container_id,) = system.run(*SERVER)
    assert system.wait([container_id], "terminal", 30) == {container_id: "failed"}
    assert "No space left on device" in system.show(container_id)["error"]["message"]
    assert system.audit() == []
