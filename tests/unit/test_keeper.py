"""The keeper: sandboxes that answer, end and are to stop, on real sockets and clocks of this machine."""

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from worker import journal as journals
from worker import keeper
from worker.cni import CniRuntime
from worker.journal import Journal
from worker.keeper import Keeper, hand_over
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import make_spec
from worker.stages import Host

LONG_S = 30.0
QUIET_S = 0.3  # so long nothing is told of a sandbox that does not answer yet
OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture
def outcomes() -> "queue.Queue[tuple[str, int, str, str]]":
    return queue.Queue()


class Told:
    """What the keeper tells, into a queue: answers as they are, all else with its name."""

    def __init__(self, into: "queue.Queue[tuple[Any, ...]]") -> None:
        self._into = into

    def ready(self, *told: Any) -> None:
        self._into.put(told)

    def ended(self, container_id: str, attempt: int) -> None:
        self._into.put((container_id, attempt, "ended"))

    def restart(self, container_id: str, attempt: int) -> None:
        self._into.put((container_id, attempt, "restart"))

    def stop(self, container_id: str, attempt: int, reason: str) -> None:
        self._into.put((container_id, attempt, "stop", reason))


@pytest.fixture
def host(settings, tmp_path) -> Host:
    """A host whose runsc writes down what it is asked to do."""
    binary = tmp_path / "runsc"
    binary.write_text(f'#!/bin/sh\necho "$@" | grep -o "kill sb.*" >> {tmp_path}/kills\n')
    binary.chmod(0o755)
    runsc = Runsc(binary, settings.runsc_root, "systrap", "sandbox", 5.0, False, settings.run_dir)
    return Host(settings, CniRuntime.from_settings(settings), runsc)


@pytest.fixture
def running(settings, outcomes, host) -> Iterator[Keeper]:
    """A keeper at work; what it tells comes into the queue."""
    made = Keeper(settings, host, Told(outcomes))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def waiting(settings) -> Callable[..., Journal]:
    """Journals of sandboxes at 127.0.0.1 that are to answer their probe."""

    def make(
        ready: str, timeout_s: float = LONG_S, ips: tuple[str, ...] = ("127.0.0.1",), **more: Any
    ) -> Journal:
        number = sum(1 for _ in settings.sandboxes_dir.iterdir()) if settings.sandboxes_dir.is_dir() else 0
        spec = make_spec(args=["true"], ready=ready, ready_timeout_s=timeout_s, **more)
        known = journals.create(settings.sandboxes_dir, f"sb-{number:016x}", attempt=3, batch="b", spec=spec)
        known.mark_begun("network")
        known.mark_done("network", {"ips": list(ips)})
        known.mark_begun("container")
        known.mark_done("container", {})
        known.mark_begun("ready")
        return known

    return make


@contextmanager
def listener(*answers: bytes) -> Iterator[int]:
    """A server that gives each connection the next answer, then hangs up; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                with suppress(OSError):  # the test is over, or the other side has hung up
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes `accept`
            thread.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def nothing_comes(outcomes: "queue.Queue[Any]") -> None:
    with pytest.raises(queue.Empty):
        outcomes.get(timeout=QUIET_S)


def test_a_port_that_accepts_is_an_answer(running, waiting, outcomes):
    with listener() as port:
        known = waiting(f"tcp:{port}")
        running.watch(known.container_id)
        assert outcomes.get(timeout=LONG_S) == (
            known.container_id,
            3,
            "answered",
            f"127.0.0.1:{port} accepts",
        )


def test_a_port_that_opens_later_is_an_answer_then(running, waiting, outcomes):
    """The program in the sandbox takes its time to listen."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        known = waiting(f"tcp:{server.getsockname()[1]}")
        running.watch(known.container_id)
        nothing_comes(outcomes)
        server.listen()
        assert outcomes.get(timeout=LONG_S)[2] == "answered"


def test_http_is_ready_once_the_status_is_good(running, waiting, outcomes):
    """A server that is starting says 500 or 503 for a while."""
    bad = (b"HTTP/1.1 500 Oh\r\n\r\n", b"HTTP/1.0 404 No\r\n\r\n", b"HTTP/1.1 100 Go on\r\n\r\n")
    with listener(*bad, b"HTTP/1.1 302 Found\r\n\r\n") as port:
        known = waiting(f"http:{port}/health?a=b")
        running.watch(known.container_id)
        assert outcomes.get(timeout=LONG_S)[2:] == ("answered", "HTTP 302")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.0 200",
        b"\r\n",
        b"HTTP/1.0\r\n",
        b"HTTP/1.0 fine\r\n",
        b"HTTP/1.0 \xff\r\n",
        b"220 250 mail.example ESMTP\r\n",
        b"x" * 200_000,
    ],
    ids=lambda answer: repr(answer[:20]),
)
def test_what_is_no_http_is_no_answer_and_does_not_end_the_wait(running, waiting, outcomes, answer):
    """Whatever a stranger's program writes, the wait goes on to its deadline."""
    with listener(answer, answer, OK) as port:
        known = waiting(f"http:{port}/")
        running.watch(known.container_id)
        assert outcomes.get(timeout=LONG_S)[2:] == ("answered", "HTTP 200")


def test_the_request_is_what_a_server_expects(running, waiting, outcomes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        running.watch(waiting(f"http:{port}/a?b=c").container_id)
        connection, _ = server.accept()
        with connection:
            lines = connection.recv(4096).decode().split("\r\n")
            connection.sendall(OK)
        assert lines[0] == "GET /a?b=c HTTP/1.0"
        assert f"Host: 127.0.0.1:{port}" in lines
        assert lines[-2:] == ["", ""]
        assert outcomes.get(timeout=LONG_S)[2] == "answered"


def test_an_ipv6_address_is_in_brackets_in_the_request(running, waiting, outcomes, monkeypatch):
    """The first address of the result is probed; not every machine that tests has IPv6."""
    connect, addresses = asyncio.open_connection, []

    def instead(address: str, port: int) -> Any:
        addresses.append(address)
        return connect("127.0.0.1", port)

    monkeypatch.setattr(asyncio, "open_connection", instead)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        running.watch(waiting(f"http:{port}/", ips=("fd00::2", "10.0.0.2")).container_id)
        connection, _ = server.accept()
        with connection:
            assert f"Host: [fd00::2]:{port}" in connection.recv(4096).decode()
            connection.sendall(OK)
        assert outcomes.get(timeout=LONG_S)[2] == "answered"
    assert addresses == ["fd00::2"]


def test_no_answer_before_the_deadline_says_what_the_sandbox_said_last(running, waiting, outcomes):
    """Its own words are the best hint at why."""
    known = waiting(f"tcp:{free_port()}", timeout_s=0.5)
    known.log_path.write_text("2026-01-01T00:00:00.000000000+00:00 stderr F cannot bind\n")
    running.watch(known.container_id)
    _, _, outcome, detail = outcomes.get(timeout=LONG_S)
    assert outcome == "deadline"
    assert detail == f"no answer to {known.spec.ready} within 0.5 s; its last words: cannot bind"


def test_a_port_that_the_image_exposes_and_nobody_listens_at_says_whence_it_is(running, waiting, outcomes):
    known = waiting("image", timeout_s=0.5, image="app")
    probe = {"spec": {"ready": f"tcp:{free_port()}"}}
    known.mark_begun("image")
    known.mark_done("image", probe)
    running.watch(known.container_id)
    detail = outcomes.get(timeout=LONG_S)[3]
    assert detail.startswith(f"no answer to {known.spec.ready} (a port that the image exposes; --ready none")


def test_a_server_that_accepts_and_says_nothing_runs_into_the_deadline(running, waiting, outcomes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = waiting(f"http:{server.getsockname()[1]}/", timeout_s=0.5)
        running.watch(known.container_id)
        assert outcomes.get(timeout=LONG_S)[2] == "deadline"


def test_the_deadline_counts_from_the_first_wait(running, waiting, outcomes, settings):
    """A worker that starts anew does not give it all the time again."""
    known = waiting(f"tcp:{free_port()}", timeout_s=3600)
    path = known.folder / journals.FILE
    path.write_text(path.read_text().replace(known.runs[-1].started_at, "2020-01-01T00:00:00.000Z"))
    running.watch(known.container_id)
    assert outcomes.get(timeout=LONG_S)[2] == "deadline"


def test_a_sandbox_that_ends_is_not_waited_for(running, waiting, outcomes, settings):
    known = waiting(f"tcp:{free_port()}")
    running.watch(known.container_id)
    nothing_comes(outcomes)
    (settings.exit_dir / known.container_id).write_text("7")
    assert outcomes.get(timeout=LONG_S) == (known.container_id, 3, "ended")
    nothing_comes(outcomes)


def test_without_a_probe_a_started_sandbox_is_ready(running, waiting, outcomes):
    running.watch(waiting("none", ips=()).container_id)
    assert outcomes.get(timeout=LONG_S)[2:] == ("answered", "no probe asked for")


def test_a_sandbox_without_an_address_cannot_be_probed(running, waiting, outcomes):
    """A network without IPAM: else somebody would wait for ever."""
    running.watch(waiting("tcp:80", ips=()).container_id)
    _, _, outcome, detail = outcomes.get(timeout=LONG_S)
    assert outcome == "failed"
    assert "network sandbatch gave it no address" in detail


def test_a_sandbox_is_waited_for_once(running, waiting, outcomes):
    """Reconcile asks again and again."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        known = waiting(f"tcp:{server.getsockname()[1]}")
        for _ in range(5):
            running.watch(known.container_id)
        server.listen()
        assert outcomes.get(timeout=LONG_S)[2] == "answered"
        nothing_comes(outcomes)


def test_many_are_waited_for_side_by_side(running, waiting, outcomes):
    """Those that do not answer hold up none that does."""
    slow = [waiting(f"tcp:{free_port()}") for _ in range(50)]
    for known in slow:
        running.watch(known.container_id)
    with listener() as port:
        known = waiting(f"tcp:{port}")
        running.watch(known.container_id)
        assert outcomes.get(timeout=LONG_S)[0] == known.container_id


@pytest.mark.parametrize("why", ["no journal", "is to end", "is ready", "was not begun"])
def test_what_need_not_be_waited_for_is_passed_over(running, waiting, outcomes, why, settings):
    """A message that comes late, or twice."""
    with listener(OK) as port:
        known = waiting(f"tcp:{port}")
        if why == "no journal":
            known.remove()
        elif why == "is to end":
            known.set_facts(wanted="exited")
        elif why == "is ready":
            known.mark_done("ready", {})
        else:
            known.mark_undone("ready")
        running.watch(known.container_id)
        nothing_comes(outcomes)


def test_a_pool_process_hands_over_by_a_datagram(running, waiting, outcomes, settings):
    with listener() as port:
        known = waiting(f"tcp:{port}")
        hand_over(settings, known.container_id)
        assert outcomes.get(timeout=LONG_S)[0] == known.container_id


def test_a_datagram_that_is_no_id_harms_nobody(running, waiting, outcomes, settings):
    for words in ("../../etc", "\udcff", "", "x" * 1000, "a\0b"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(words.encode(errors="surrogateescape"), str(keeper.socket_path(settings)))
    with listener() as port:
        known = waiting(f"tcp:{port}")
        hand_over(settings, known.container_id)
        assert outcomes.get(timeout=LONG_S)[0] == known.container_id


def test_without_a_keeper_a_hand_over_is_lost_in_silence(settings, waiting):
    """The worker is stopping; the next one looks at the journals."""
    hand_over(settings, waiting("none").container_id)


def test_a_keeper_starts_where_a_killed_one_left_its_socket_and_stops_clean(
    settings, outcomes, waiting, host
):
    path = keeper.socket_path(settings)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as old:
        old.bind(str(path))
    made = Keeper(settings, host, Told(outcomes))
    made.start()
    assert path.stat().st_mode & 0o777 == 0o600
    made.watch(waiting(f"tcp:{free_port()}").container_id)
    made.stop()
    assert not path.exists()
    assert outcomes.empty()
    assert "keeper" not in [thread.name for thread in threading.enumerate()]
    assert os.listdir(settings.run_dir) == ["exits"]


# -- ends and clocks -------------------------------------------------------------------------------


@pytest.fixture
def started(waiting) -> Callable[..., Journal]:
    """Journals of sandboxes that run."""

    def make(**spec: Any) -> Journal:
        known = waiting("none", **spec)
        known.mark_done("ready", {})
        known.set_facts(running_at=journals.now())
        return known

    return make


def test_an_end_is_told_with_the_attempt(running, started, outcomes, settings):
    """conmon renames the file into place; what it wrote before has another name."""
    known = started()
    file = settings.exit_dir / f"{known.container_id}.AB12CD"
    file.write_text("7")
    nothing_comes(outcomes)
    file.rename(settings.exit_dir / known.container_id)
    assert outcomes.get(timeout=LONG_S) == (known.container_id, 3, "ended")


def test_the_end_of_one_that_is_being_undone_is_no_news(running, started, outcomes, settings):
    known = started()
    known.set_facts(wanted="exited")
    (settings.exit_dir / known.container_id).write_text("137")
    nothing_comes(outcomes)


def test_an_end_before_the_hand_over_is_told_then(running, waiting, outcomes, settings):
    """The program was faster than the stage that started it."""
    known = waiting("none")
    known.mark_undone("container")
    (settings.exit_dir / known.container_id).write_text("7")
    nothing_comes(outcomes)
    known.mark_begun("container")
    known.mark_done("container", {})
    hand_over(settings, known.container_id)
    assert outcomes.get(timeout=LONG_S) == (known.container_id, 3, "ended")


def test_two_hundred_ends_at_once_are_all_told(running, started, outcomes, settings):
    names = [started().container_id for _ in range(200)]
    for name in names:
        (settings.exit_dir / name).write_text("7")
    assert sorted(outcomes.get(timeout=LONG_S)[0] for _ in names) == sorted(names)


def kills(tmp_path, count: int) -> list[str]:
    """What runsc was asked to kill, once there are so many lines."""
    deadline = time.monotonic() + LONG_S
    while True:
        lines = (tmp_path / "kills").read_text().splitlines() if (tmp_path / "kills").exists() else []
        if len(lines) >= count or time.monotonic() > deadline:
            return lines
        time.sleep(0.02)


def sandbox_of(settings: Settings, known: Journal) -> "subprocess.Popen[bytes]":
    """A process that looks like a sandbox's, and does not care for TERM."""
    argv = [sys.executable, "-c", "input()", f"--root={settings.runsc_root}", "boot", known.container_id]
    return subprocess.Popen(argv, stdin=subprocess.PIPE)


@pytest.mark.parametrize(("asked", "sent"), [(None, "TERM"), ("SIGINT", "SIGINT")])
def test_a_sandbox_is_asked_to_end_at_its_ttl_and_killed_after_the_grace(
    running, started, settings, tmp_path, asked, sent
):
    """All of it on this host: nothing is told, so no broker is needed."""
    known = started(ttl_s=0.3, stop_grace_s=0.3, stop_signal=asked)
    with sandbox_of(settings, known) as process:
        running.watch(known.container_id)
        assert process.wait(LONG_S) == -signal.SIGKILL
    assert kills(tmp_path, 1) == [f"kill {known.container_id} {sent}"]
    stop = journals.read(known.folder).facts["stop"]
    assert (stop["reason"], stop["grace_s"]) == ("ttl", 0.3)


def test_a_broker_that_is_away_holds_up_no_clock(started, settings, host, tmp_path):
    """What is told hangs; TERM and KILL come all the same."""
    hangs = threading.Event()

    class Away(Told):
        def ended(self, container_id: str, attempt: int) -> None:
            hangs.wait(LONG_S)

    made = Keeper(settings, host, Away(queue.Queue()))
    made.start()
    for _ in range(20):
        (settings.exit_dir / started().container_id).write_text("7")
    known = started(ttl_s=0.1, stop_grace_s=0)
    with sandbox_of(settings, known) as process:
        made.watch(known.container_id)
        assert process.wait(LONG_S) == -signal.SIGKILL
    hangs.set()
    made.stop()


def test_a_wish_to_stop_of_the_worker_before_goes_on(running, started, settings, tmp_path):
    """It died between TERM and KILL; the program may never have heard TERM."""
    known = started()
    wish = {"at": "2020-01-01T00:00:00.000Z", "grace_s": 5.0, "reason": "stop"}
    known.set_facts(stop=wish)
    with sandbox_of(settings, known) as process:
        running.watch(known.container_id)
        assert process.wait(LONG_S) == -signal.SIGKILL
    assert kills(tmp_path, 1) == [f"kill {known.container_id} TERM"]


def test_the_next_start_is_told_when_it_is_due(running, started, outcomes, settings):
    known = started(restart="on-failure")
    at = datetime.fromtimestamp(time.time() + 0.5, UTC).isoformat()
    known.set_facts(restarts=1, restart_at=at)
    running.watch(known.container_id)
    nothing_comes(outcomes)
    assert outcomes.get(timeout=LONG_S) == (known.container_id, 3, "restart")


def test_the_deadline_of_a_launch_is_told(running, waiting, outcomes):
    """It runs nothing that could be stopped here."""
    known = waiting("none", deadline_at="2020-01-01T00:00:00Z")
    known.mark_undone("ready")
    known.mark_undone("container")
    running.watch(known.container_id)
    assert outcomes.get(timeout=LONG_S) == (known.container_id, 3, "stop", "deadline")
