"""Wait for sandboxes to answer, all of them in one thread: waiting holds no launch slot.

The thread runs an asyncio loop; a pool process hands a sandbox over by a datagram with its id.
The journal holds everything else, so that a new worker takes the waiting up again.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from worker import conmon, journal
from worker.errors import JournalError
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import READY

FIRST_DELAY_S, LAST_DELAY_S = 0.02, 0.5  # netstack answers within a millisecond once the program listens
CONNECT_TIMEOUT_S = 2.0  # for a SYN without an answer; a closed port answers at once
EXIT_LOOK_S = 0.25
SHOWN_LINES = 5

# Container id, attempt, "answered" | "deadline" | "ended" | "failed", detail.
Outcome = Callable[[str, int, str, str], None]


def socket_path(settings: Settings) -> Path:
    return settings.run_dir / "prober.sock"


def hand_over(settings: Settings, container_id: str) -> None:
    """Ask this host's prober to wait for a sandbox; without one it is lost, and reconcile asks again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(container_id.encode(), str(socket_path(settings)))


class Prober:
    """The waiting sandboxes of one host; `on_outcome` is called in a thread, once for each."""

    def __init__(self, settings: Settings, on_outcome: Outcome) -> None:
        self._settings = settings
        self._on_outcome = on_outcome
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def start(self) -> None:
        path = socket_path(self._settings)
        path.unlink(missing_ok=True)  # of a worker that was killed; the host lock says there is no other
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._socket.close()
        socket_path(self._settings).unlink(missing_ok=True)

    def wait_for(self, container_id: str) -> None:
        """Begin to wait for a sandbox, unless it is waited for already."""
        self._loop.call_soon_threadsafe(self._begin, container_id)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._loop.run_forever()
        for task in list(self._waiting.values()):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._waiting.values(), return_exceptions=True))
        self._loop.remove_reader(self._socket.fileno())
        self._loop.close()

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._begin(self._socket.recv(256).decode(errors="replace"))

    def _begin(self, container_id: str) -> None:
        if container_id not in self._waiting:
            task = self._loop.create_task(self._wait(container_id))
            self._waiting[container_id] = task
            task.add_done_callback(lambda _: self._waiting.pop(container_id, None))

    async def _wait(self, container_id: str) -> None:
        try:
            known = journal.read(self._settings.sandboxes_dir / container_id)
        except JournalError:
            return  # removed while its datagram was on the way
        if known.is_unwinding or known.is_done("ready") or "ready" not in known.begun:
            return
        left_s = known.spec.ready_timeout_s - (time.time() - _begun_at(known))
        probe = asyncio.create_task(until_ready(known))
        ended = asyncio.create_task(self._until_ended(container_id))
        try:
            done, _ = await asyncio.wait(
                {probe, ended}, timeout=max(0.0, left_s), return_when="FIRST_COMPLETED"
            )
        finally:
            probe.cancel()
            ended.cancel()
        error = probe.exception() if probe in done else None
        if error is not None:  # whatever it is, somebody waits for an outcome
            outcome, detail = "failed", f"it cannot be probed: {error}"
        elif probe in done:
            outcome, detail = "answered", probe.result()
        elif ended in done:
            outcome, detail = "ended", f"it ended with exit code {ended.result()} before it was ready"
        else:
            outcome = "deadline"
            detail = f"no answer to {known.spec.ready} within {known.spec.ready_timeout_s:g} s"
        if outcome != "answered":
            detail += _log_words(known)
        # Not in this thread: it publishes, and a broker that is away must not stop the other probes.
        await self._loop.run_in_executor(None, self._on_outcome, container_id, known.attempt, outcome, detail)

    async def _until_ended(self, container_id: str) -> int:
        while True:
            code = conmon.exit_code(self._settings.exit_dir, container_id)
            if code is not None:
                return code
            await asyncio.sleep(EXIT_LOOK_S)


async def until_ready(known: Journal) -> str:
    """Probe until the sandbox answers; what it answered, in words."""
    match = READY.fullmatch(known.spec.ready)
    if match is None or known.spec.ready == "none":
        return "no probe asked for"
    if not known.data["network"]["ips"]:
        raise ValueError(f"network {known.spec.network} gave it no address")
    address, delay_s = known.data["network"]["ips"][0], FIRST_DELAY_S
    while True:
        try:
            if match["http"]:
                return await _http(address, int(match["http"]), match["path"])
            return await _tcp(address, int(match["tcp"]))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            await asyncio.sleep(delay_s)  # nothing tells us when a remote port opens
            delay_s = min(LAST_DELAY_S, delay_s * 1.3)


async def _tcp(address: str, port: int) -> str:
    _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), CONNECT_TIMEOUT_S)
    writer.close()
    return f"{address}:{port} accepts"


async def _http(address: str, port: int, path: str) -> str:
    """Ready is any status below 400, as for Kubernetes' httpGet probes."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), CONNECT_TIMEOUT_S)
    host = f"[{address}]" if ":" in address else address
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nUser-Agent: sandbatch\r\n\r\n".encode())
        status_line = await reader.readuntil(b"\r\n")  # bounded by the deadline of the whole wait
        status = int(status_line.split()[1])
        if not status_line.startswith(b"HTTP/") or not 200 <= status < 400:
            raise ValueError(status)
        return f"HTTP {status}"
    except IndexError:
        raise ValueError("no HTTP") from None
    finally:
        writer.close()


def _begun_at(known: Journal) -> float:
    started = [run.started_at for run in known.runs if run.name == "ready" and run.verb == "do"][-1]
    return datetime.fromisoformat(started).timestamp()


def _log_words(known: Journal) -> str:
    words = conmon.tail_log(known.log_path, SHOWN_LINES).strip()
    return f"; its last words: {words}" if words else "; it wrote nothing"
