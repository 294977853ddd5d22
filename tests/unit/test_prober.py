"""Waiting for sandboxes to answer, on real sockets of this machine."""

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from worker import journal as journals
from worker import prober
from worker.journal import Journal
from worker.prober import Prober, hand_over
from worker.settings import Settings
from worker.spec import make_spec

LONG_S = 30.0
QUIET_S = 0.3  # so long nothing is told of a sandbox that does not answer yet
OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture
def settings(tmp_path) -> Settings:
    settings = Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    settings.exit_dir.mkdir(parents=True)
    return settings


@pytest.fixture
def outcomes() -> "queue.Queue[tuple[str, int, str, str]]":
    return queue.Queue()


@pytest.fixture
def running(settings, outcomes) -> Iterator[Prober]:
    """A prober at work; its outcomes come into the queue."""
    made = Prober(settings, lambda *outcome: outcomes.put(outcome))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def waiting(settings) -> Callable[..., Journal]:
    """Journals of sandboxes at 127.0.0.1 that are to answer their probe."""

    def make(ready: str, timeout_s: float = LONG_S, ips: tuple[str, ...] = ("127.0.0.1",)) -> Journal:
        number = sum(1 for _ in settings.sandboxes_dir.iterdir()) if settings.sandboxes_dir.is_dir() else 0
        spec = make_spec(args=["true"], ready=ready, ready_timeout_s=timeout_s)
        known = journals.create(settings.sandboxes_dir, f"sb-{number:016x}", attempt=3, batch="b", spec=spec)
        known.mark_begun("network")
        known.mark_done("network", {"ips": list(ips)})
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
        running.wait_for(known.container_id)
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
        running.wait_for(known.container_id)
        nothing_comes(outcomes)
        server.listen()
        assert outcomes.get(timeout=LONG_S)[2] == "answered"


def test_http_is_ready_once_the_status_is_good(running, waiting, outcomes):
    """A server that is starting says 500 or 503 for a while."""
    bad = (b"HTTP/1.1 500 Oh\r\n\r\n", b"HTTP/1.0 404 No\r\n\r\n", b"HTTP/1.1 100 Go on\r\n\r\n")
    with listener(*bad, b"HTTP/1.1 302 Found\r\n\r\n") as port:
        known = waiting(f"http:{port}/health?a=b")
        running.wait_for(known.container_id)
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
        running.wait_for(known.container_id)
        assert outcomes.get(timeout=LONG_S)[2:] == ("answered", "HTTP 200")


def test_the_request_is_what_a_server_expects(running, waiting, outcomes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        running.wait_for(waiting(f"http:{port}/a?b=c").container_id)
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
        running.wait_for(waiting(f"http:{port}/", ips=("fd00::2", "10.0.0.2")).container_id)
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
    running.wait_for(known.container_id)
    _, _, outcome, detail = outcomes.get(timeout=LONG_S)
    assert outcome == "deadline"
    assert detail == f"no answer to {known.spec.ready} within 0.5 s; its last words: cannot bind"


def test_a_server_that_accepts_and_says_nothing_runs_into_the_deadline(running, waiting, outcomes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = waiting(f"http:{server.getsockname()[1]}/", timeout_s=0.5)
        running.wait_for(known.container_id)
        assert outcomes.get(timeout=LONG_S)[2] == "deadline"


def test_the_deadline_counts_from_the_first_wait(running, waiting, outcomes, settings):
    """A worker that starts anew does not give it all the time again."""
    known = waiting(f"tcp:{free_port()}", timeout_s=3600)
    path = known.folder / journals.FILE
    path.write_text(path.read_text().replace(known.runs[-1].started_at, "2020-01-01T00:00:00.000Z"))
    running.wait_for(known.container_id)
    assert outcomes.get(timeout=LONG_S)[2] == "deadline"


def test_a_sandbox_that_ends_is_not_waited_for(running, waiting, outcomes, settings):
    known = waiting(f"tcp:{free_port()}")
    running.wait_for(known.container_id)
    nothing_comes(outcomes)
    (settings.exit_dir / known.container_id).write_text("7")
    _, _, outcome, detail = outcomes.get(timeout=LONG_S)
    assert outcome == "ended"
    assert detail == "it ended with exit code 7 before it was ready; it wrote nothing"


def test_without_a_probe_a_started_sandbox_is_ready(running, waiting, outcomes):
    running.wait_for(waiting("none", ips=()).container_id)
    assert outcomes.get(timeout=LONG_S)[2:] == ("answered", "no probe asked for")


def test_a_sandbox_without_an_address_cannot_be_probed(running, waiting, outcomes):
    """A network without IPAM: else somebody would wait for ever."""
    running.wait_for(waiting("tcp:80", ips=()).container_id)
    _, _, outcome, detail = outcomes.get(timeout=LONG_S)
    assert outcome == "failed"
    assert "network sandbatch gave it no address" in detail


def test_a_sandbox_is_waited_for_once(running, waiting, outcomes):
    """Reconcile asks again and again."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        known = waiting(f"tcp:{server.getsockname()[1]}")
        for _ in range(5):
            running.wait_for(known.container_id)
        server.listen()
        assert outcomes.get(timeout=LONG_S)[2] == "answered"
        nothing_comes(outcomes)


def test_many_are_waited_for_side_by_side(running, waiting, outcomes):
    """Those that do not answer hold up none that does."""
    slow = [waiting(f"tcp:{free_port()}") for _ in range(50)]
    for known in slow:
        running.wait_for(known.container_id)
    with listener() as port:
        known = waiting(f"tcp:{port}")
        running.wait_for(known.container_id)
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
        running.wait_for(known.container_id)
        nothing_comes(outcomes)


def test_a_pool_process_hands_over_by_a_datagram(running, waiting, outcomes, settings):
    with listener() as port:
        known = waiting(f"tcp:{port}")
        hand_over(settings, known.container_id)
        assert outcomes.get(timeout=LONG_S)[0] == known.container_id


def test_a_datagram_that_is_no_id_harms_nobody(running, waiting, outcomes, settings):
    for words in ("../../etc", "\udcff", "", "x" * 1000, "a\0b"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(words.encode(errors="surrogateescape"), str(prober.socket_path(settings)))
    with listener() as port:
        known = waiting(f"tcp:{port}")
        hand_over(settings, known.container_id)
        assert outcomes.get(timeout=LONG_S)[0] == known.container_id


def test_without_a_prober_a_hand_over_is_lost_in_silence(settings, waiting):
    """The worker is stopping; the next one looks at the journals."""
    hand_over(settings, waiting("none").container_id)


def test_a_prober_starts_where_a_killed_one_left_its_socket_and_stops_clean(settings, outcomes, waiting):
    path = prober.socket_path(settings)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as old:
        old.bind(str(path))
    made = Prober(settings, lambda *outcome: outcomes.put(outcome))
    made.start()
    assert path.stat().st_mode & 0o777 == 0o600
    made.wait_for(waiting(f"tcp:{free_port()}").container_id)
    made.stop()
    assert not path.exists()
    assert outcomes.empty()
    assert "prober" not in [thread.name for thread in threading.enumerate()]
    assert os.listdir(settings.run_dir) == ["exits"]
