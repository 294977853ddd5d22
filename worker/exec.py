"""One more command in a running sandbox: `runsc exec`, its streams, its end, and nothing of it left.

A client of `runsc exec` that is killed leaves its command running (seen with the 2024 and 2026 ones),
so the command is ended from inside, by the pid that runsc has written to a file. The file's name has
the sandbox's id: a worker that comes after a killed one ends what that one has begun.
"""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import termios
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import conmon, faults, journal
from worker.calls import ExecCall, Talk
from worker.errors import JournalError, RunscError, SandbatchError
from worker.exec_process import make_process
from worker.journal import Journal
from worker.runsc import Runsc, clean_env, last_message
from worker.settings import Settings
from worker.spec import CONTAINER_ID

CHUNK_BYTES = 1 << 16
CANNOT_EXECUTE, NOT_FOUND, TIMED_OUT = 126, 127, 124  # as docker and timeout(1) have them
NOT_STARTED = 128  # what runsc itself ends with
STARTING_S, FAREWELL_S = 5.0, 5.0
LOOK_S = 0.01
ROUNDS = 5  # of looks for children that were started while others were stopped


@dataclass(frozen=True)
class Ended:
    """How a command ended; `words` where there is more to say than its exit code."""

    exit_code: int
    words: str = ""


class _Limit(Exception):
    """The command has written more than was allowed."""


async def run_exec(settings: Settings, runsc: Runsc, call: ExecCall, talk: Talk) -> Ended:
    """Run the command of the call to its end; whatever ends the conversation ends the command.

    As docker does, it returns when the command has ended, though children that it has left behind
    may still have its streams; these go on.

    Raises:
        SandbatchError: The sandbox is not running, or runsc refuses.
    """
    known = check_running(settings, call.container_id)
    process = make_process(known, call)
    settings.execs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    pid_file = settings.execs_dir / f"{call.container_id}.{call.call_id}"
    run = _Run(runsc, call, talk, pid_file, process)
    try:
        return await run.to_its_end()
    finally:
        run.close()
        pid_file.unlink(missing_ok=True)


def check_running(settings: Settings, container_id: str) -> Journal:
    """The journal of a sandbox whose command runs.

    Raises:
        SandbatchError: The sandbox is not here, or its command does not run.
    """
    try:
        known = journal.read(settings.sandboxes_dir / container_id)
    except JournalError:
        raise SandbatchError(container_id, "is not on its host any more", "see sandbatch ls") from None
    ended = conmon.exit_code(settings.exit_dir, container_id) is not None
    if ended or not known.is_up:
        words = "has ended" if ended or known.is_unwinding else "does not run yet"
        raise SandbatchError(container_id, f"its command {words}", "see sandbatch show")
    return known


class _Run:
    """One command. Its pipes are read and written by this loop, its end is a pidfd's."""

    def __init__(
        self, runsc: Runsc, call: ExecCall, talk: Talk, pid_file: Path, process: dict[str, Any]
    ) -> None:
        self._runsc, self._call, self._talk, self._pid_file = runsc, call, talk, pid_file
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._wakes: set[asyncio.Event] = set()  # of readers, which also wait for the end
        self._written = 0  # bytes of output
        self._complaint = b""  # what runsc said of a command that it could not start
        with _in_memory(json.dumps(process).encode()) as fd:
            argv = faults.program("runsc.exec", self._argv(fd))
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.PIPE if call.stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=clean_env(),
                start_new_session=True,
                bufsize=0,
                pass_fds=[fd],
            )
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    def close(self) -> None:
        """Nothing of it is left: neither client nor descriptors."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    async def to_its_end(self) -> Ended:
        call, out, err = self._call, self._process.stdout, self._process.stderr
        readers = [
            asyncio.create_task(self._read(stream, pipe.fileno()))
            for stream, pipe in (("stdout", out), ("stderr", err))
            if pipe is not None
        ]
        tasks = [*readers, *([asyncio.create_task(self._feed())] if call.stdin else [])]
        try:
            async with asyncio.timeout(call.timeout_s):
                await asyncio.gather(*readers)  # they end with the command
        except TimeoutError:
            return Ended(TIMED_OUT, f"it ran longer than {call.timeout_s:g} s and was ended")
        except _Limit:
            return Ended(1, f"it wrote more than {call.output_limit} bytes and was ended")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self._exited.is_set():  # time, limit, a lost client, the worker's own end
                await _to_its_end(self._end_inside())
        code = self._process.returncode
        if code == NOT_STARTED and not self._pid_file.exists():
            return self._not_started()
        if code < 0:
            raise RunscError(
                f"runsc exec {call.container_id}", "it was killed from outside", "see the host's log"
            )
        return Ended(code)

    def _argv(self, process_fd: int) -> list[str]:
        return [
            *(str(self._runsc.binary), *self._runsc.global_args(), "exec"),
            f"--internal-pid-file={self._pid_file}",
            f"--process=/dev/fd/{process_fd}",
            self._call.container_id,
        ]

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._process.wait()
        self._exited.set()
        for one in self._wakes:
            one.set()

    # -- its streams -------------------------------------------------------------------------------

    async def _read(self, stream: str, fd: int) -> None:
        """Hand on what it writes, until it has ended and all that it had written is read."""
        is_first = True
        while not self._exited.is_set():
            await self._readable(fd)
            data = _read_some(fd, CHUNK_BYTES)
            if data is None:
                continue
            if is_first and stream == "stderr" and not await self._has_started():
                self._complaint += data
                continue
            is_first = False
            if not data:
                await self._exited.wait()
                return
            await self._hand_on(stream, data)
        # Not to its end: a child that was left behind may keep it open for ever, and write for ever.
        left = int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), "little")
        while left > 0:
            data = _read_some(fd, min(left, CHUNK_BYTES))
            if not data:
                return
            left -= len(data)
            if is_first and stream == "stderr" and not await self._has_started():
                self._complaint += data
            else:
                await self._hand_on(stream, data)

    async def _hand_on(self, stream: str, data: bytes) -> None:
        limit = self._call.output_limit
        room = len(data) if limit is None else max(0, limit - self._written)
        self._written += len(data)
        if data[:room]:
            await self._talk.output(stream, data[:room])
        if len(data) > room:
            raise _Limit

    async def _has_started(self) -> bool:
        """Whether the command runs, or ran; until then what is on stderr are runsc's own words."""
        while not self._pid_file.exists():
            if self._exited.is_set():
                return self._pid_file.exists()
            with suppress(TimeoutError):  # runsc writes the file just after the start
                async with asyncio.timeout(LOOK_S):
                    await self._exited.wait()
        return True

    async def _feed(self) -> None:
        """Write the client's input; what a command does not read is dropped once it has closed it."""
        pipe, is_open = self._process.stdin, True
        if pipe is None:
            return
        while (data := await self._talk.input()) is not None:
            rest = memoryview(data)
            while rest and is_open:
                try:
                    rest = rest[os.write(pipe.fileno(), rest) :]
                except BlockingIOError:
                    await self._writable(pipe.fileno())
                except BrokenPipeError:
                    is_open = False
            await self._talk.took(len(data))
        pipe.close()

    async def _readable(self, fd: int) -> None:
        """Until there is something to read, or the command has ended."""
        ready = asyncio.Event()
        self._wakes.add(ready)
        self._loop.add_reader(fd, ready.set)
        try:
            if not self._exited.is_set():
                await ready.wait()
        finally:
            self._loop.remove_reader(fd)
            self._wakes.discard(ready)

    async def _writable(self, fd: int) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(fd)

    # -- its end -----------------------------------------------------------------------------------

    async def _end_inside(self) -> None:
        """End the command and its children inside the sandbox, then the client."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STARTING_S):
                await self._has_started()
        pid = _pid_in(self._pid_file)
        if pid is not None and not self._exited.is_set():
            await asyncio.to_thread(end_tree, self._runsc, self._call.container_id, pid)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._exited.wait()

    def _not_started(self) -> Ended:
        """runsc could not start the command: as a shell has it, 127 if there is none, else 126."""
        words = last_message(self._complaint.decode(errors="replace"))
        words = words.removeprefix("executing processes for container: ")
        if "executing command" not in words:
            raise RunscError(f"runsc exec {self._call.container_id}", words, "see sandbatch show")
        is_missing = "no such file" in words and "working directory" not in words
        return Ended(
            NOT_FOUND if is_missing else CANNOT_EXECUTE, words.partition(" in sandbox: ")[2] or words
        )


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file without a name: whatever is killed, nothing of it is left, and no one else can read it."""
    fd = os.memfd_create("process.json")
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
        yield fd
    finally:
        os.close(fd)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Work that goes on through any cancellation of its caller."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


def end_tree(runsc: Runsc, container_id: str, pid: int) -> None:
    """SIGKILL a command inside a sandbox and all that descends from it. Safe to repeat."""
    stopped: list[int] = []
    for _ in range(ROUNDS):
        new = [one for one in _descendants(runsc, container_id, pid) if one not in stopped]
        if not new:
            break
        for one in new:  # what is stopped starts no more children
            runsc.kill_inside(container_id, one, "STOP")
        stopped += new
    for one in stopped:
        runsc.kill_inside(container_id, one, "KILL")


def _descendants(runsc: Runsc, container_id: str, pid: int) -> list[int]:
    """A command and its children's children, parents first; empty once it has ended.

    Only what `runsc exec` or the start has begun has no parent, so no pid of another is taken for it.
    """
    parents = runsc.processes(container_id)
    if parents.get(pid) != 0 or pid == 1:
        return []
    tree = [pid]
    for one in tree:
        tree += [child for child, parent in parents.items() if parent == one]
    return tree


def end_left_over(settings: Settings, runsc: Runsc) -> None:
    """End what the execs of a killed worker have left inside sandboxes. For the start, before any exec."""
    for pid_file in left_over(settings):
        pid, container_id = _pid_in(pid_file), pid_file.name.partition(".")[0]
        try:
            if pid is not None:
                end_tree(runsc, container_id, pid)
        except SandbatchError:
            pass  # its sandbox has ended, or ends: so does what ran in it
        pid_file.unlink(missing_ok=True)


def left_over(settings: Settings) -> Iterator[Path]:
    """The pid files of execs that are under way, or were when their worker was killed."""
    with suppress(FileNotFoundError):
        for name in os.listdir(settings.execs_dir):
            if CONTAINER_ID.fullmatch(name.partition(".")[0]):
                yield settings.execs_dir / name


def _pid_in(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return None  # not started, or the file is being written


def _read_some(fd: int, count: int) -> bytes | None:
    """What can be read now: empty at the end, None if there is nothing yet."""
    try:
        return os.read(fd, count)
    except BlockingIOError:
        return None
