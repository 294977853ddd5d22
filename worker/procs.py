"""The processes of a sandbox on this host, found by what their command lines say, and ended safely.

conmon, runsc and what runsc starts carry the container id on their command line (as a word or as a
folder of the bundle's path: the 2024 gofer has only the latter) and the runsc root. Both must fit:
another tool's sandboxes have another root, and an editor or a `tail` of a log has none.
"""

import os
import re
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAMED_S = 1.0  # no execve takes so long
CONTAINER_ID_PART = re.compile(r"sb-[0-9a-f]{16}")


@dataclass(frozen=True)
class Proc:
    """One live process. `start_time` in clock ticks since boot: with it a pid is never mistaken.

    `role` is conmon, sandbox, gofer, or runsc for a verb that is still at work.
    """

    pid: int
    start_time: int
    role: str
    container_id: str


def all_sandbox_processes(root: Path) -> list[Proc]:
    """Every process of every sandbox with runsc root `root`.

    Zombies are not among them: they have no command line left, hold nothing, and count as dead.
    """
    return list(_scan(root, None))


def processes_of(root: Path, container_id: str) -> list[Proc]:
    """Every process of one sandbox."""
    return list(_scan(root, container_id))


def whole(found: Iterable[Proc]) -> set[str]:
    """Of which sandboxes both conmon and the sandbox itself are among `found`.

    Without its conmon nobody reads what a sandbox writes, nor keeps its exit code.
    """
    roles: dict[str, set[str]] = {}
    for proc in found:
        roles.setdefault(proc.container_id, set()).add(proc.role)
    return {container_id for container_id, there in roles.items() if {"conmon", "sandbox"} <= there}


def is_one_being_named() -> bool:
    """Whether a process that is younger than a second has no command line: it may be in its execve.

    For that moment nobody can say whose it is. gVisor's stubs have none either, and stay so.
    """
    oldest = (time.clock_gettime(time.CLOCK_BOOTTIME) - NAMED_S) * os.sysconf("SC_CLK_TCK")
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if not _raw_command_line(int(name)):
            fields = _stat(int(name))
            if fields and fields[0] not in "ZX" and int(fields[19]) > oldest:
                return True
    return False


def end(procs: Iterable[Proc], timeout_s: float) -> list[Proc]:
    """SIGKILL `procs`, wait for their ends, and return those that still live after `timeout_s`."""
    with PidFds(procs) as fds:
        fds.kill()
        return fds.wait(timeout_s)


class PidFds:
    """Handles on processes that are certainly the ones meant: no signal can reach a reused pid."""

    def __init__(self, procs: Iterable[Proc]) -> None:
        self._fds: dict[int, Proc] = {}
        for proc in procs:
            try:
                fd = os.pidfd_open(proc.pid)
            except ProcessLookupError:
                continue
            # Only now, with the pid held by the descriptor, does its start time prove who it is.
            if start_time(proc.pid) == proc.start_time:
                self._fds[fd] = proc
            else:
                os.close(fd)

    def __enter__(self) -> "PidFds":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def kill(self) -> None:
        for fd in self._fds:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended

    def wait(self, timeout_s: float) -> list[Proc]:
        """Wait until all have ended; those that have not by then are returned."""
        poller, waiting = select.poll(), dict(self._fds)
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while waiting:
            left_s = deadline - time.monotonic()
            for fd, _ in poller.poll(max(0.0, left_s) * 1000):
                poller.unregister(fd)
                del waiting[fd]
            if left_s <= 0:
                break
        return list(waiting.values())


def start_time(pid: int) -> int | None:
    """Start time of a process, zombies included; None where there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def identify(pid: int, root: Path) -> Proc | None:
    """What this process is to the sandboxes below `root`; None for a stranger."""
    words = _command_line(pid)
    found = _read(words, f"--root={root}") if words else None
    ticks = start_time(pid) if found else None
    return Proc(pid, ticks, *found) if found and ticks is not None else None


def _scan(root: Path, container_id: str | None) -> Iterator[Proc]:
    wanted = container_id.encode() if container_id else b"sb-"
    root_arg = f"--root={root}"
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        raw = _raw_command_line(int(name))
        # Two cheap looks first: with a thousand sandboxes there are thousands of processes.
        if wanted not in raw or b"--root=" not in raw:
            continue
        found = _read(_words(raw), root_arg)
        if found and container_id in (None, found[1]):
            ticks = start_time(int(name))
            if ticks is not None:
                yield Proc(int(name), ticks, *found)


def _read(words: list[str], root_arg: str) -> tuple[str, str] | None:
    """Role and container id of a command line, or None where it is not one of ours."""
    is_conmon = f"--runtime-arg={root_arg}" in words
    if not is_conmon and root_arg not in words:
        return None
    container_id = _container_id([word for word in words if not word.endswith(root_arg)])
    if container_id is None:
        return None
    if is_conmon:
        return "conmon", container_id
    if "boot" in words:
        return "sandbox", container_id
    return ("gofer" if "gofer" in words else "runsc"), container_id


def _container_id(words: list[str]) -> str | None:
    for word in reversed(words):  # runsc has it last, and as a whole word
        if CONTAINER_ID_PART.fullmatch(word):
            return word
    for word in words:
        if "=" in word:
            word = word.split("=", 1)[1]
        for part in word.split("/"):
            if CONTAINER_ID_PART.fullmatch(part):
                return part
    return None


def _command_line(pid: int) -> list[str]:
    return _words(_raw_command_line(pid))


def _words(raw: bytes) -> list[str]:
    return raw.decode(errors="replace").rstrip("\0").split("\0") if raw else []


def _raw_command_line(pid: int) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY)
    except OSError:
        return b""
    try:
        raw = part = os.read(fd, 65536)
        while part:  # a read may end early, at a page
            part = os.read(fd, 65536)
            raw += part
        return raw
    except OSError:
        return b""  # it ended between the two calls
    finally:
        os.close(fd)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may itself hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
