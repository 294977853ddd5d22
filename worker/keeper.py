"""Keeps the sandboxes of a host: sees them answer and end, and has the clock of those that are to stop.

One thread with an asyncio loop; waiting holds no launch slot. A pool process hands a sandbox over by
a datagram with its id; the journal holds everything else, so that a new worker takes all of it up
again. Ends are events: conmon renames an exit file into place, inotify tells.

What is due on this host (TERM, KILL) is done here, whether or not there is a broker; what is to be
told goes out through `Tell`, from threads of its own, as a broker that is away must hold up nothing.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from asyncinotify import Inotify, Mask

from worker import conmon, ends, journal
from worker.errors import JournalError, SandbatchError
from worker.journal import Journal
from worker.prober import until_ready
from worker.settings import Settings
from worker.spec import CONTAINER_ID
from worker.stages import Host

log = logging.getLogger("sandbatch")
LOCK_WAIT_S = 5.0
AGAIN_S = 1.0  # after an act that found the sandbox busy, or a kill that did not end it
MAX_KILLS = 10
LONGEST_SLEEP_S = 86400.0  # a clock that is set back must not keep a sandbox for ever
THREADS = 4  # of each of the two pools


class Tell(Protocol):
    """What the tasks layer makes messages of. Each is called in a thread, and may raise when it cannot."""

    def ready(self, container_id: str, attempt: int, outcome: str, detail: str) -> None:
        """`outcome` is "answered", "deadline" or "failed"; `detail` in words."""

    def ended(self, container_id: str, attempt: int) -> None: ...

    def restart(self, container_id: str, attempt: int) -> None: ...

    def stop(self, container_id: str, attempt: int, reason: str) -> None: ...


def socket_path(settings: Settings) -> Path:
    return settings.run_dir / "keeper.sock"


def hand_over(settings: Settings, container_id: str) -> None:
    """Ask this host's keeper to look at a sandbox; without one it is lost, and reconcile asks again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(container_id.encode(), str(socket_path(settings)))


class Keeper:
    """The live sandboxes of one host."""

    def __init__(self, settings: Settings, host: Host, tell: Tell) -> None:
        self._settings = settings
        self._host = host
        self._tell = tell
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._clocks: dict[str, asyncio.TimerHandle] = {}
        self._asked: set[str] = set()  # have been sent TERM by this process
        self._kills: dict[str, int] = {}
        self._acting: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._acts = ThreadPoolExecutor(THREADS, "keeper-act")
        self._tells = ThreadPoolExecutor(THREADS, "keeper-tell")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inotify = Inotify()

    def start(self) -> None:
        path = socket_path(self._settings)
        path.unlink(missing_ok=True)  # of a worker that was killed; the host lock says there is no other
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.setblocking(False)
        exits = self._settings.exit_dir
        exits.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._inotify.add_watch(exits, Mask.MOVED_TO | Mask.CLOSE_WRITE)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; sandboxes go on. What a thread tells just now is waited for."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._socket.close()
        socket_path(self._settings).unlink(missing_ok=True)
        for pool in (self._acts, self._tells):
            pool.shutdown(wait=False, cancel_futures=True)

    def watch(self, container_id: str) -> None:
        """Look at a sandbox: wait for its answer if that is due, and set its clock. Safe to repeat."""
        self._loop.call_soon_threadsafe(self._look, container_id)

    # -- the loop ----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.add_reader(self._socket.fileno(), self._receive)
        exits = self._loop.create_task(self._see_ends())
        self._loop.run_forever()
        for clock in self._clocks.values():
            clock.cancel()
        tasks = [exits, *self._waiting.values(), *self._acting]
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._inotify.close()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.close()

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._look(self._socket.recv(256).decode(errors="replace"))

    def _look(self, container_id: str) -> None:
        known = self._read(container_id)
        if known is None or known.is_unwinding or known.final:
            self._forget(container_id)
            return
        if known.is_up and conmon.exit_code(self._settings.exit_dir, container_id) is not None:
            self._say(self._tell.ended, container_id, known.attempt)  # before anybody could see it
            return
        is_waited_for = "ready" in known.begun and not known.is_done("ready")
        if is_waited_for and known.is_up and container_id not in self._waiting:
            task = self._loop.create_task(self._wait(known))
            self._waiting[container_id] = task
            task.add_done_callback(lambda _: self._waiting.pop(container_id, None))
        self._set_clock(known)

    def _read(self, container_id: str) -> Journal | None:
        """None where there is no sandbox (any more)."""
        if not CONTAINER_ID.fullmatch(container_id):
            return None
        try:
            return journal.read(self._settings.sandboxes_dir / container_id)
        except JournalError:
            return None  # removed while its datagram was on the way; or audit shows it

    def _forget(self, container_id: str) -> None:
        self._stop_clock(container_id)
        self._asked.discard(container_id)
        self._kills.pop(container_id, None)

    def _say(self, tell: Callable[..., None], *args: Any) -> None:
        """Tell in a thread; reconcile tells again what could not be told."""

        def call() -> None:
            try:
                tell(*args)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the log
                log.warning("cannot be told of it: %s", error, extra={"sandbox": args[0]})

        self._tells.submit(call)

    # -- ends --------------------------------------------------------------------------------------

    async def _see_ends(self) -> None:
        async for event in self._inotify:
            if Mask.Q_OVERFLOW in event.mask:  # reconcile finds what was missed
                log.warning("inotify has lost ends; they are looked for")
            elif event.name is not None:
                self._see_end(event.name.name)

    def _see_end(self, name: str) -> None:
        known = self._read(name)
        if known is None or not known.is_up:
            return  # a file of conmon's own, or it is being undone
        if name in self._waiting:
            self._waiting[name].cancel()
        self._stop_clock(name)
        self._say(self._tell.ended, name, known.attempt)

    # -- the clock ---------------------------------------------------------------------------------

    def _set_clock(self, known: Journal) -> None:
        self._stop_clock(known.container_id)
        due = ends.next_due(known, was_asked=known.container_id in self._asked)
        if due is not None:
            self._set(known.container_id, due.at_s - time.time(), due.act)

    def _set(self, container_id: str, in_s: float, act: str) -> None:
        if in_s > LONGEST_SLEEP_S:
            self._clocks[container_id] = self._loop.call_later(LONGEST_SLEEP_S, self._look, container_id)
        else:
            self._clocks[container_id] = self._loop.call_later(max(0.0, in_s), self._ring, container_id, act)

    def _stop_clock(self, container_id: str) -> None:
        clock = self._clocks.pop(container_id, None)
        if clock is not None:
            clock.cancel()

    def _ring(self, container_id: str, act: str) -> None:
        self._clocks.pop(container_id, None)
        known = self._read(container_id)
        if known is None or known.is_unwinding:
            self._forget(container_id)
        elif act == "restart":
            self._say(self._tell.restart, container_id, known.attempt)
        elif act == "term":
            self._asked.add(container_id)
            self._do(container_id, ends.send_term, self._host, known)
        elif act == "kill":
            self._kills[container_id] = self._kills.get(container_id, 0) + 1
            self._do(container_id, ends.send_kill, self._host, container_id)
        elif known.is_up:
            self._do(container_id, self._time_is_up, container_id, act)
        else:  # no program to stop, and none to hold up: it can wait for the broker
            self._say(self._tell.stop, container_id, known.attempt, act)

    def _do(self, container_id: str, act: Callable[..., None], *args: Any) -> None:
        """Act in a thread, then look again."""

        async def act_and_look() -> None:
            pause_s = 0.0
            try:
                await self._loop.run_in_executor(self._acts, act, *args)
            except (SandbatchError, OSError) as error:
                log.warning("%s", error, extra={"sandbox": container_id})
                pause_s = AGAIN_S
            if container_id in self._kills:  # its end is an event now
                pause_s = ends.KILLED_S
            if self._kills.get(container_id, 0) > MAX_KILLS:
                words = "does not die; sandbatch rm, and see its kernel stack"
                log.error(words, extra={"sandbox": container_id})
            else:
                self._stop_clock(container_id)
                self._clocks[container_id] = self._loop.call_later(pause_s, self._look, container_id)

        task = self._loop.create_task(act_and_look())
        self._acting.add(task)
        task.add_done_callback(self._acting.discard)

    def _time_is_up(self, container_id: str, reason: str) -> None:
        with (
            contextlib.suppress(JournalError),  # it has just ended
            journal.locked(self._settings.sandboxes_dir, container_id, wait_s=LOCK_WAIT_S) as known,
        ):
            if known.is_up:
                ends.ask_to_stop(known, reason, known.spec.stop_grace_s)

    # -- answers -----------------------------------------------------------------------------------

    async def _wait(self, known: Journal) -> None:
        """Probe until the sandbox answers, or its time is up; an end cancels this."""
        left_s = known.spec.ready_timeout_s - (time.time() - _begun_at(known))
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                outcome, detail = "answered", await until_ready(known)
        except TimeoutError:
            outcome = "deadline"
            probe = f"{known.spec.ready}{ends.probe_source(known)}"
            detail = f"no answer to {probe} within {known.spec.ready_timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for an outcome
            outcome, detail = "failed", f"it cannot be probed: {error}"
        if outcome != "answered":
            detail += ends.last_words(known)
        self._say(self._tell.ready, known.container_id, known.attempt, outcome, detail)


def _begun_at(known: Journal) -> float:
    started = [run.started_at for run in known.runs if run.name == "ready" and run.verb == "do"][-1]
    return journal.seconds(started)
