"""The read-only view that `runsc create` has of the host, and what its gofer really mounted.

runscs before July 2025 mount a "read-only" bind writable on the host's side, and only the sentry
refuses to write (measured: O_TRUNC gets through; gVisor commit 8a1a0408a mends it). So `create` runs
in a mount namespace of its own, in which each source is covered by a mount of itself that is `ro,
nosuid,nodev`, with all mounts below it. A bind takes over the flags of the mount it is made from. The
namespace has no name and ends with the gofer: there is nothing to undo, and nothing that a reboot or a
killed worker leaves.
"""

import ctypes
import errno
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import HostNotReady, NotContained, SandbatchError
from worker.own_thread import in_own_thread

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE, MS_SLAVE = 0x4000, 1 << 18, 1 << 19
# One number each on every architecture that gVisor runs on (Linux, include/uapi/asm-generic/unistd.h).
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 437, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_EMPTY_PATHS = 0x04 | 0x40  # from a handle, onto another
RESOLVE_NO_SYMLINKS = 4
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
FLAGS = ("ro", "nosuid", "nodev")  # the same, as mountinfo has them
ESCAPED = re.compile(rb"[ \t\n\\#]")  # as \040 in mountinfo
ROOT = "/"
OWN_TABLE = Path("/proc/self/mountinfo")
SEE_LOG = "see runsc.log in the run folder"
CHROOT_S, CHROOT_PAUSE_S = 2.0, 0.005


@dataclass(frozen=True)
class Given:
    """What a sandbox is given of the host: the folder or file `source`, at `target` inside."""

    target: str
    source: str
    is_recursive: bool = False  # with what is mounted below it
    is_own: bool = (
        False  # in sandbatch's own folders, whose path may lead by a symlink of the administrator's
    )


@dataclass(frozen=True)
class View:
    """The namespace for one `create`, and which inode each target must lead to.

    `namespace` is valid inside the block of `read_only_view` alone.
    """

    namespace: Path
    expected: Mapping[str, tuple[int, int]]  # target -> device and inode
    recursive: frozenset[str]

    def may_hold(self, point: Path) -> bool:
        """It lies below a target that comes with what is mounted below its source."""
        return any(point.is_relative_to(Path(target)) for target in self.recursive)


@dataclass(frozen=True)
class MountLine:
    """One line of a mountinfo file: what of which file system is mounted where, and how."""

    root: str  # the path of what is mounted, in its own file system
    point: Path
    flags: frozenset[str]

    @property
    def lacking(self) -> list[str]:
        """Which of `FLAGS` it lacks."""
        return [one for one in FLAGS if one not in self.flags]


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


class _OpenHow(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("flags", "mode", "resolve"))


def given_by(config: Mapping[str, Any], own: Sequence[Path]) -> list[Given]:
    """What a config.json gives of the host: the root first, then its binds.

    `own`: the folders of sandbatch itself, as the settings name them.
    """

    def given(target: str, source: str, options: Sequence[str] = ()) -> Given:
        is_own = any(Path(source).is_relative_to(folder) for folder in own)
        return Given(target, source, "rbind" in options, is_own)

    binds = [one for one in config["mounts"] if one["type"] == "bind"]
    return [
        given(ROOT, config["root"]["path"]),
        *(given(one["destination"], one["source"], one["options"]) for one in binds),
    ]


@contextmanager
def read_only_view(given: Sequence[Given]) -> Iterator[View]:
    """A mount namespace in which each source is read-only; nothing changes in the host's own.

    The covers are private: what the host mounts or unmounts below a source later stays outside.

    Raises:
        HostNotReady: The kernel cannot make one.
        NotContained: A symlink is in the path of a source, which had none when it was checked.
        SandbatchError: A source is not there.
    """
    handle, expected = in_own_thread("read-only view", lambda: _make(given))
    try:
        recursive = frozenset(one.target for one in given if one.is_recursive)
        yield View(Path(f"/proc/{os.getpid()}/fd/{handle}"), expected, recursive)
    finally:
        os.close(handle)


def confirm(gofer_pid: int, view: View) -> None:
    """See that a created container has what the view expects and nothing else, all of it read-only.

    Somebody who may write to an allowed folder on the host can put a symlink in place of a part of a
    source's path: before the view is made, which follows none, or before the gofer mounts it, which then
    has another inode, and no cover. A mount once made does not change any more, and nothing of the
    sandbox has run before `start`: this look has no such gap.

    Raises:
        NotContained: Something else is mounted, something is writable, or it cannot be seen.
    """
    try:
        _wait_for_root(gofer_pid, view.expected[ROOT])
        lines = {str(one.point): one for one in mounts_of(gofer_pid)}
        found = {one: _inode(Path(f"/proc/{gofer_pid}/root{one}")) for one in view.expected if one in lines}
    except OSError as error:
        raise NotContained("mounts of the sandbox", f"cannot be seen: {error.strerror}", SEE_LOG) from error
    for target, inode in view.expected.items():
        if target not in lines:
            raise NotContained(f"mount at {target}", "runsc has not mounted it", SEE_LOG)
        if found[target] != inode:
            why = f"{lines[target].root} was in its place when runsc mounted it"
            raise NotContained(f"mount at {target}", why, "see who writes to the allowed folder on the host")
    for point, line in lines.items():
        if line.lacking:
            why = f"runsc has mounted it without {', '.join(line.lacking)}"
            raise NotContained(f"mount at {point}", why, "take another runsc, see sandbatch doctor")
        if point not in view.expected and not view.may_hold(line.point):
            raise NotContained(f"mount at {point}", "the bundle has nothing there", SEE_LOG)


def _wait_for_root(gofer_pid: int, inode: tuple[int, int]) -> None:
    """Wait until the gofer has changed its root: `create` does not wait for that, and nothing tells it."""
    deadline = time.monotonic() + CHROOT_S
    while _inode(Path(f"/proc/{gofer_pid}/root/")) != inode and time.monotonic() < deadline:
        time.sleep(CHROOT_PAUSE_S)


def mounts_of(pid: int) -> list[MountLine]:
    """The mounts that a process can reach, as it sees them, the uppermost of a place last.

    Raises:
        OSError: It has ended.
    """
    return [parse_mount(line) for line in Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines()]


def parse_mount(line: bytes) -> MountLine:
    """One line of a mountinfo file (proc_pid_mountinfo(5))."""
    fields = line.split(b" ")
    flags = frozenset(fields[5].decode().split(","))
    return MountLine(_text(fields[3]), Path(_text(fields[4])), flags)


def mounted_below(folder: Path) -> str:
    """A mount point of ours below a folder; empty if there is none."""
    table = OWN_TABLE.read_bytes()
    if not folder.is_dir():
        return ""
    # Most of a busy host's lines are netns of sandboxes: only those that can match are parsed.
    prefix = ESCAPED.sub(lambda found: b"\\%03o" % found[0][0], os.fsencode(folder)).rstrip(b"/")
    lines = (parse_mount(line) for line in table.splitlines() if b" " + prefix + b"/" in line)
    return next((str(one.point) for one in lines if folder in one.point.parents), "")


def _make(given: Sequence[Given]) -> tuple[int, dict[str, tuple[int, int]]]:
    """In a thread of its own: enter a new namespace, cover each source, and return a handle on it."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(CLONE_NEWNS), "unshare")
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None), "mount")
    expected = {one.target: _cover(libc, one) for one in given}
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), expected


def _cover(libc: ctypes.CDLL, one: Given) -> tuple[int, int]:
    place = _open(libc, one)
    try:
        return _cover_place(libc, one, place)
    finally:
        os.close(place)


def _open(libc: ctypes.CDLL, one: Given) -> int:
    """A handle on the source itself; a symlink on the way to it has been put there since it was checked."""
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, 0 if one.is_own else RESOLVE_NO_SYMLINKS)
    call = (SYS_OPENAT2, AT_FDCWD, os.fsencode(one.source), ctypes.byref(how), ctypes.sizeof(how))
    place = _syscall(libc, *call)
    if place < 0 and ctypes.get_errno() == errno.ELOOP:
        todo = "see who writes to the allowed folder on the host"
        raise NotContained(f"mount at {one.target}", f"a symlink was in the path of {one.source}", todo)
    return _check(place, one.source)


def _cover_place(libc: ctypes.CDLL, one: Given, place: int) -> tuple[int, int]:
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | (AT_RECURSIVE if one.is_recursive else 0)
    tree = _check(_syscall(libc, SYS_OPEN_TREE, place, b"", flags), one.source)
    try:
        attr = _MountAttr(ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, MS_PRIVATE, 0)
        size = ctypes.sizeof(attr)
        call = (SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, ctypes.byref(attr), size)
        _check(_syscall(libc, *call), one.source)
        move = (SYS_MOVE_MOUNT, tree, b"", place, b"", MOVE_MOUNT_EMPTY_PATHS)
        _check(_syscall(libc, *move), one.source)
        return _inode(tree)
    finally:
        os.close(tree)


def _syscall(libc: ctypes.CDLL, number: int, *args: Any) -> int:
    """syscall(2); its integers are longs."""
    return int(libc.syscall(ctypes.c_long(number), *map(_as_long, args)))


def _as_long(value: Any) -> Any:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _check(result: int, what: str) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EPERM):
        why = f"cannot make a read-only view ({os.strerror(number)})"
        raise HostNotReady(f"mount namespace: {what}", why, "Linux 5.12 or later is needed, and root")
    raise SandbatchError(f"bind {what}", os.strerror(number), "see that it is on the sandbox's host")


def _inode(place: int | Path) -> tuple[int, int]:
    found = os.stat(place)
    return found.st_dev, found.st_ino


def _text(field: bytes) -> str:
    """Spaces and the like stand there as \\040."""
    return os.fsdecode(field.decode("unicode_escape").encode("latin-1"))
