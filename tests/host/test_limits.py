"""Limits on real runsc: what a sandbox may use, what happens to one that wants more, what is left."""

import contextlib
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from tasks.submit import submit
from tests.conftest import lack
from tests.host.machine import difference, snapshot
from tests.host.system import System
from worker import journal as journals
from worker import limits
from worker.errors import ProcessTimeout, RunscError
from worker.launch import run_stage, undo_all
from worker.probe_runsc import probe
from worker.settings import Settings
from worker.spec import Spec, make_spec, new_container_id
from worker.stages import cgroup_of, make_host

OTHER = "sandbatch-other"  # cgroup_parent of a second sandbatch
LOOP = ("--", "sh", "-c", "(while :; do :; done) & while :; do :; done")
EATER = "x = []\nwhile True: x.append(bytearray(2**20))"
# A server that answers without a thread or a child, beside a fork bomb.
BOMB = """
import http.server, os, subprocess
subprocess.Popen(["sh", "-c", "b() { b | b & }; b; while :; do sleep 0.1; b; done"])
os.chdir("/var/www/html")
http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
# Root may become other users, and the kernel's count of processes is one a user.
HOPPER = """
import os, time
for uid in range(1000, 1400):
    if os.fork() == 0:
        os.setuid(uid)
        for _ in range(100):
            try:
                if os.fork() == 0:
                    break
            except OSError:
                break
        time.sleep(60)
    time.sleep(0.01)
time.sleep(60)
"""


@pytest.fixture(autouse=True, scope="module")
def cgroups(host_parts: None) -> Iterator[None]:
    """Cgroups with what limits need; the folder for all of ours, which stays, goes after the tests."""
    if not {"memory", "cpu", "pids"} <= limits.controllers():
        lack("this machine has no cgroups with memory, cpu and pids")
    yield
    for folder in [
        tree.mount / parent for tree in limits.trees() for parent in (limits.DEFAULT_PARENT, OTHER)
    ]:
        with contextlib.suppress(OSError):  # it was there before, and another's sandboxes are in it
            folder.rmdir()


def folders(container_id: str, parent: str = limits.DEFAULT_PARENT) -> list[Path]:
    found = [tree.mount / parent / container_id for tree in limits.trees()]
    return [folder for folder in found if folder.is_dir()]


def number(container_id: str, *names: str) -> int:
    """A number of the sandbox's cgroup, by its name in v1 or in v2."""
    (found,) = {f / name for f in folders(container_id) for name in names if (f / name).exists()}
    return int(found.read_text().split()[-1 if found.name == "cpu.stat" else 0])


def cpu_seconds(container_id: str) -> float:
    for folder in folders(container_id):
        if (folder / "cpuacct.usage").exists():
            return int((folder / "cpuacct.usage").read_text()) / 1e9
        for line in (folder / "cpu.stat").read_text().splitlines() if (folder / "cpu.stat").exists() else ():
            if line.startswith("usage_usec "):
                return int(line.split()[1]) / 1e6
    raise AssertionError(f"no cgroup of {container_id} counts its time")


# -- through the whole system ------------------------------------------------------------------------


def test_an_endless_loop_is_held_to_its_share(clean_system: System) -> None:
    """Two loops on two cores would take 2 CPUs."""
    (one,) = clean_system.run("--cpus", "0.5", "--memory", "256m", "--wait", *LOOP)
    began, used = time.monotonic(), cpu_seconds(one)
    time.sleep(2)
    share = (cpu_seconds(one) - used) / (time.monotonic() - began)
    assert 0.2 < share < 0.6, share
    row = clean_system.show(one)
    assert row["limits"] == {"memory_bytes": 256 * 2**20, "cpus": 0.5, "pids": 1024}
    assert "memory 256m, cpus 0.5, pids 1024" in clean_system.cli("show", one).stdout
    assert clean_system.audit() == []


def test_who_eats_more_than_its_memory_ends_with_oom(clean_system: System) -> None:
    assert not Path("oom").exists()
    (one,) = clean_system.run("--memory", "64m", "--", "python3", "-c", EATER)
    assert clean_system.wait([one], "terminal") == {one: "failed"}
    row = clean_system.show(one)
    assert (row["reason"], row["oom"]) == ("oom", True)
    assert row["error"] == {
        "stage": "container",
        "message": "oom: killed for want of memory; its limit is 64m",
    }
    assert folders(one) == []
    assert not Path("oom").exists()  # conmon leaves one in its own working folder, not in the worker's


def test_a_fork_bomb_is_held_to_its_pids_and_the_sandbox_answers(clean_system: System) -> None:
    """gVisor refuses the fork; the pids cgroup, which would end the sandbox, is far away."""
    (one,) = clean_system.run("--pids", "40", "--ready", "tcp:8000", "--wait", "--", "python3", "-c", BOMB)
    log = clean_system.sandboxes / one / "container.log"
    clean_system.wait_until(lambda: "Cannot fork" in log.read_text(), 20, "refusal of a fork")
    url = f"http://{clean_system.show(one)['ip']}:8000/"
    for _ in range(5):
        assert urllib.request.urlopen(url, timeout=20).read() == b"Hello World!\n"
        assert number(one, "pids.current") < 4 * 40 + 100
    assert clean_system.show(one)["state"] == "running"


def test_a_limit_that_cannot_work_is_refused_with_the_least_that_does(clean_system: System) -> None:
    """By the command, and by the host, which may get its orders from elsewhere."""
    for option, value, least in (
        ("--memory", "8m", "24m"),
        ("--cpus", "0.001", "0.01"),
        ("--pids", "0", "1"),
    ):
        done = clean_system.cli("run", option, value, "--", "true", check=False)
        assert done.returncode == 2, done.stderr
        assert least in done.stderr.removeprefix(option), done.stderr
    settings = Settings(run_dir=clean_system.run_dir)
    client = Client(settings)
    spec = make_spec(args=["true"], memory_bytes=8 * 2**20, networks=[{"name": "bridged"}])
    _, (one,) = submit(client.app(), client.record, settings, [spec])
    assert clean_system.wait([one], "terminal") == {one: "failed"}
    assert "give it 24m or more" in clean_system.show(one)["error"]["message"]


def test_an_orphaned_cgroup_is_found_and_removed(clean_system: System) -> None:
    """The folder for all is no leak; one with an id that no journal has is, and what still runs in it."""
    orphan = new_container_id()
    trees = [one for one in limits.trees() if one.is_v2 or {"memory", "pids"} & one.controllers]
    made = sorted({one.mount / limits.DEFAULT_PARENT / orphan for one in trees if one.mount.is_dir()})
    for folder in made:
        folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as left:
        for folder in made:
            (folder / "cgroup.procs").write_text(str(left.pid))
        assert sorted(clean_system.audit()) == sorted(f"extra cgroup {folder}" for folder in made)
        clean_system.cli("audit", "--mend")
        assert left.wait(10) == -9
    assert folders(orphan) == []


@pytest.mark.timeout(300)
def test_killed_around_its_cgroup_nothing_is_left(make_system: Any) -> None:
    """Limits by the host's default; kill -9 after runsc made the cgroup, and while it is removed."""
    system = make_system(
        SANDBATCH_ALLOW_FAULTS="1", SANDBATCH_DEFAULT_MEMORY="128m", SANDBATCH_CGROUP_PARENT=OTHER
    )
    for point in ("conmon.create.after", "cgroup.remove.after"):
        system.env["SANDBATCH_FAULTS"] = f"{point}:kill"
        system.start()
        (one,) = system.run("--", "sleep", "1000")
        if point.startswith("cgroup"):
            system.wait([one], "running")
            assert system.show(one)["limits"]["memory_bytes"] == 128 * 2**20
            assert (bool(folders(one, OTHER)), folders(one)) == (True, [])
            system.cli("rm", "--no-wait", one)
        system.wait_for_end()
        system.env.pop("SANDBATCH_FAULTS")
        system.start()
        goal = "terminal" if point.startswith("cgroup") else "running"
        assert system.wait([one], goal) == {one: "exited" if goal == "terminal" else "running"}, point
        assert system.audit() == [], point
        system.cli("rm", "--all")
        assert (folders(one, OTHER), system.audit()) == ([], []), point
        system.stop()


def test_an_oom_while_no_worker_lives_is_known_later(make_system: Any) -> None:
    """The cgroup stays until the undo, and with it what the kernel noted."""
    system = make_system()
    system.start()
    (one,) = system.run(
        "--memory", "64m", "--wait", "--", "python3", "-c", f"import time; time.sleep(5)\n{EATER}"
    )
    system.kill_worker()
    system.wait_until((system.run_dir / "exits" / one).exists, 30, "exit code")
    system.start()
    assert system.wait([one], "terminal") == {one: "failed"}
    assert (system.show(one)["reason"], system.audit()) == ("oom", [])


# -- the stages alone --------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    """Begin a sandbox without network, undo it after the test; the machine is then as before."""
    before = snapshot()
    own: dict[str, Any] = {"state_dir": tmp_path / "state", "run_dir": tmp_path / "run"}
    settings = Settings(**own, runsc=os.environ.get("SANDBATCH_RUNSC", ""), runsc_timeout_s=8)
    host = make_host(settings, hides_sysctl=probe(settings).hides_sysctl)
    made: list[journals.Journal] = []

    def begin(**fields: Any) -> journals.Journal:
        spec: Spec = make_spec(**fields)
        known = journals.create(settings.sandboxes_dir, new_container_id(), attempt=1, batch="b", spec=spec)
        made.append(known)
        for stage in ("netns", "bundle", "container"):
            run_stage(host, known, stage)
        return known

    yield begin
    for known in made:
        undo_all(host, known)
    assert difference(before, snapshot()) == {}


def test_a_sandbox_without_limits_has_no_cgroup(launch: Any) -> None:
    """It would cost each launch some 20 ms; a limit of processes that is the host's default needs none."""
    assert folders(launch(args=["sleep", "100"], pids=1024).container_id) == []
    assert folders(launch(args=["sleep", "100"], pids=100).container_id) != []


def test_a_start_that_dies_of_its_limit_says_oom(launch: Any) -> None:
    """Less than the least is refused long before; a program with a great root may need more."""
    with pytest.raises(RunscError, match="oom: killed for want of memory; its limit is 12m; give it more"):
        launch(args=["sleep", "100"], memory_bytes=12 * 2**20)


def test_the_least_memory_suffices(launch: Any) -> None:
    script = "import time; print(1, flush=True); time.sleep(100)"
    known = launch(args=["python3", "-c", script], memory_bytes=limits.LEAST_MEMORY)
    deadline = time.monotonic() + 20
    while "stdout F 1" not in known.log_path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not limits.was_oom_killed(cgroup_of(known))


def test_who_hops_between_users_meets_the_cgroup(launch: Any) -> None:
    """RLIMIT_NPROC is a user's, and root in a sandbox can be many: then the host's count ends it."""
    known = launch(args=["python3", "-c", HOPPER], pids=10)
    most = limits.most_host_tasks(10)
    deadline, peak = time.monotonic() + 60, 0
    while not (known.folder.parents[2] / "run" / "exits" / known.container_id).exists():
        with contextlib.suppress(ValueError):  # it has just ended
            peak = max(peak, number(known.container_id, "pids.current"))
        assert time.monotonic() < deadline, f"{peak} of {most}"
        time.sleep(0.02)
    assert 100 < peak <= most


def test_a_create_that_is_killed_leaves_no_cgroup(launch: Any, tmp_path: Path) -> None:
    """Whatever of runsc is in the cgroup when it dies, and however far it had come."""
    for delay_s in (0.05, 0.1):
        killer = threading.Timer(delay_s, _kill_runsc, (str(tmp_path),))
        killer.start()
        with contextlib.suppress(RunscError, ProcessTimeout):
            launch(args=["sleep", "100"], memory_bytes=64 * 2**20, cpus=1.0)
        killer.join()


def _kill_runsc(place: str) -> None:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path("/proc", pid, "cmdline").read_text().split("\0")
            if f"--root={place}/run/runsc" in words and "create" in words:
                os.kill(int(pid), 9)
