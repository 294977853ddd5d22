"""`sandbatch up` and the processes that it starts: none of them goes on without those it needs."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tasks.connection import connect
from tests.host.conftest import SUBNETS
from tests.host.system import SERVER, System
from tests.storm.system import StormSystem, parent_of
from worker import procs
from worker.settings import Settings


def worker_that_starts(system: System, timeout_s: float = 20.0) -> int:
    """The pid of a worker that has only just been started by its tini."""
    mark = f"SANDBATCH_RUN_DIR={system.run_dir}".encode()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                environ = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"cli", b"worker"] and mark in environ and is_below_tini(int(name)):
                    return int(name)
            except OSError:
                continue
        time.sleep(0.005)
    raise AssertionError("no worker has started")


def is_below_tini(pid: int) -> bool:
    """The same command is tini itself, in the end: until it has replaced itself it is ours."""
    return Path(f"/proc/{parent_of(pid)}/comm").read_text().strip() == "tini"


def test_a_worker_whose_tini_is_killed_while_it_starts_ends(unchanged_machine, tmp_path):
    """An orphan goes on: nobody reaps there, and no other worker could start (seen in a storm)."""
    system = StormSystem(tmp_path / "system", next(SUBNETS))
    system.prepare("worker")
    system.spawn("")
    pid = worker_that_starts(system)
    ticks = procs.start_time(pid)

    os.kill(parent_of(pid), signal.SIGKILL)

    try:
        system.wait_until(lambda: procs.start_time(pid) != ticks, 15, "end of the worker without a tini")
        assert "tini: ended while the worker started" in system.log()
    finally:
        procs.end([procs.Proc(pid, ticks or 0, "worker", "")], timeout_s=5)
        system.remove()


def test_up_ends_when_its_broker_is_killed(make_system):
    """A worker without a broker does nothing for ever; what restarts `up` finds all that the broker knew."""
    system = make_system()
    system.start()
    (container_id,) = system.run("--wait", *SERVER)
    with contextlib.closing(connect(Settings(run_dir=system.run_dir))) as client:
        pid = client.info("server")["process_id"]

    os.kill(pid, signal.SIGKILL)

    assert system.process.wait(30) == 1
    assert "the broker (its log:" in system.log()
    system.start()
    assert system.wait([container_id], "running", 15) == {container_id: "running"}
