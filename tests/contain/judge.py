"""What sandboxes must leave as it was, seen from the host: folders, baits, and the machine."""

import fcntl
import hashlib
import os
import re
import secrets
import select
import socket
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("mode", "uid", "gid", "nlink", "size", "rdev", "ino", "mtime_ns", "ctime_ns")
SYSCTLS = ("kernel", "vm", "fs")
VOLATILE = {"kernel/ns_last_pid", "kernel/tainted"}  # they change by themselves
CLOCK_TOLERANCE_S = 600  # a clock that is being disciplined may jump; an attempt sets it by hours
LISTENING = re.compile(r"(?:\S+\s+){3}0A (?:\S+\s+){5}(\d+)")  # of /proc/net/tcp; UDP's have state 07
UDP = re.compile(r"(?:\S+\s+){3}07 (?:\S+\s+){5}(\d+)")
Snapshot = dict[str, dict[str, Any]]


def snapshot(*folders: Path) -> Snapshot:
    """All that folders hold, and what lies around each: path -> what its inode says, and its content."""
    found: Snapshot = {}
    for folder in folders:
        for path in (folder, *sorted(folder.rglob("*"))):
            found[str(path)] = _look(path)
        found[f"{folder.parent}/"] = {"names": sorted(os.listdir(folder.parent))}
    return found


def _look(path: Path) -> dict[str, Any]:
    seen = path.lstat()
    found = {name: getattr(seen, f"st_{name}") for name in FIELDS}
    found["xattrs"] = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }
    if stat.S_ISLNK(seen.st_mode):
        found["target"] = os.readlink(path)
    elif stat.S_ISREG(seen.st_mode):
        found["atime_ns"] = seen.st_atime_ns  # of links and folders a mere look changes it
        descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@dataclass(frozen=True, eq=False)
class Offset:
    """How far apart two clocks are; equal to another as far as it matters."""

    seconds: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Offset) and abs(self.seconds - other.seconds) < CLOCK_TOLERANCE_S


def machine() -> Snapshot:
    """Host name, mounts, the writable sysctls, and by how much the clock is off the time since boot."""
    found: Snapshot = {
        "the machine": {"names": os.uname().nodename + "." + _text("/proc/sys/kernel/domainname")}
    }
    mounts = (line.split(" ", 3)[3] for line in _text("/proc/self/mountinfo").splitlines())
    found["the mounts"] = {"lines": sorted(line for line in mounts if "/netns/" not in line)}
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    found["the clock"] = {"boot": Offset(time.time() - since_boot)}
    for name in SYSCTLS:
        for path in Path("/proc/sys", name).rglob("*"):
            short = str(path.relative_to("/proc/sys"))
            if path.is_file() and path.stat().st_mode & 0o200 and short not in VOLATILE:
                found[f"sysctl {short}"] = {"value": _text(path)}
    return found


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    """What came, went and changed, in words; nothing where nothing did."""
    words = [f"{path} came" for path in after if path not in before]
    words += [f"{path} went" for path in before if path not in after]
    for path, was in before.items():
        now = after.get(path, was)
        words += [
            f"{path}: {name} was {was.get(name)!r}, is {now.get(name)!r}"
            for name in {**was, **now}
            if was.get(name) != now.get(name)
        ]
    return words


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError as error:  # many sysctls can only be written to, or are of hardware that is not there
        return str(error.errno)


# -- the processes of sandboxes ----------------------------------------------------------------------


def strangers(ids: Iterable[str], run_dir: Path) -> list[str]:
    """What processes of these sandboxes should not be or have: other programs, and doors on the host."""
    words, listening = [], dict(_listening())
    for pid, command in _processes_of(ids):
        program = os.readlink(f"/proc/{pid}/exe") if os.path.exists(f"/proc/{pid}/exe") else "runsc"
        if not re.search(r"runsc|conmon|/exe|memfd", program):
            words.append(f"{pid} runs {program}: {command}")
        for door in _sockets(pid) & set(listening):
            if str(run_dir) not in listening[door] and not listening[door].endswith("/attach"):  # conmon's
                words.append(f"{pid} ({command}) listens: {listening[door]}")
    return words


def _processes_of(ids: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Those with an id among their words, and all that they have started."""
    parents, known, commands = {}, set(), {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "conmon" in commands[pid] and any(one in commands[pid] for one in ids):
            known.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in known and pid in commands} - known:
        known |= more
    return ((pid, commands[pid][:60]) for pid in sorted(known))


def _sockets(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    return found


def _listening() -> Iterator[tuple[str, str]]:
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in _text(f"/proc/net/{name}").splitlines()[1:]:
            if found := (UDP if "udp" in name else LISTENING).match(line.strip()):
                yield found[1], f"{name} {line.split()[1]}"
    for line in _text("/proc/net/unix").splitlines()[1:]:
        fields = line.split()
        if fields[3] == "00010000":  # it accepts connections
            yield fields[6], f"unix {' '.join(fields[7:])}"


# -- baits -------------------------------------------------------------------------------------------


class Bait:
    """A folder of everything that a hostile program could use, as `hostile make` lays it out.

    A socket listens in it, and its FIFO holds a token; `heard` says what came of both.
    """

    def __init__(self, program: Path, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.token = folder, secrets.token_hex(16)
        if not folder.exists():
            subprocess.run([program, "make", folder], check=True, env=env)
        at = os.open(folder, os.O_PATH)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(f"/proc/self/fd/{at}/socket")  # its own path may be too long for an address
        os.close(at)
        (folder / "socket").chmod(0o777)
        self._door.listen()
        self._door.setblocking(False)
        self._fifo = os.open(folder / "fifo", os.O_RDWR | os.O_NONBLOCK)
        os.write(self._fifo, self.token.encode())
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.utime(path, ns=(1, path.stat().st_mtime_ns))  # reading now changes it, also with relatime

    def heard(self) -> list[str]:
        """What came through socket and FIFO, and who holds locks of its files; once."""
        words = []
        try:
            self._door.accept()[0].close()
            words.append(f"{self.folder}/socket: somebody connected")
        except BlockingIOError:
            pass  # as it should be
        held = os.read(self._fifo, 1000) if _is_readable(self._fifo) else b""
        if held != self.token.encode():
            words.append(f"{self.folder}/fifo: held {self.token!r}, holds {held!r}")
        return words

    def locks(self) -> list[str]:
        """Whether somebody holds a lock of the file `mine`."""
        words = []
        try:
            descriptor = os.open(self.folder / "mine", os.O_RDWR | os.O_NONBLOCK)
        except BlockingIOError:
            return [f"{self.folder}/mine: leased"]
        for name, lock in {"flock": fcntl.flock, "lockf": fcntl.lockf}.items():
            try:
                lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                words.append(f"{self.folder}/mine: {name} is held")
        os.close(descriptor)
        return words

    def close(self) -> None:
        self._door.close()
        os.close(self._fifo)


def _is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])
