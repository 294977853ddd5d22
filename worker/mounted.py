"""What runsc really mounted: the gofer's mount table, looked at after `create` and before `start`.

Between our look at a source (`worker.mounts`) and runsc's mount of it, somebody who may write to an
allowed folder on the host can put a symlink in place of a part of the path. A mount once made does
not change any more, so this look has no such gap, and nothing of the sandbox has run by then.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from worker import procs
from worker.errors import SandbatchError


@dataclass(frozen=True)
class MountLine:
    """One line of a mountinfo file: what of which file system is mounted where."""

    device: str
    root: str  # the path of what is mounted, in its own file system
    point: PurePosixPath


def mount_lines(path: Path) -> Iterator[MountLine]:
    """The mounts of a process, as it sees them, the uppermost of a place last."""
    for line in path.read_bytes().splitlines():
        fields = line.split(b" ")
        yield MountLine(fields[2].decode(), _text(fields[3]), PurePosixPath(_text(fields[4])))


def confirm_binds(runsc_root: Path, container_id: str, binds: dict[str, str]) -> None:
    """See that a created container has these sources (target -> source) mounted, and no others there.

    Raises:
        SandbatchError: Something else is mounted, or it cannot be seen.
    """
    gofers = [one for one in procs.processes_of(runsc_root, container_id) if one.role == "gofer"]
    found = {str(one.point): one for gofer in gofers for one in _of_process(gofer.pid)}
    own = _of_process(os.getpid())
    for target, source in binds.items():
        there = found.get(target)
        if there is None:
            raise SandbatchError(f"bind {source}", f"runsc has not mounted it at {target}", "see runsc.log")
        if (there.device, there.root) != where(source, own):
            why = f"{there.root} was in its place when runsc mounted it"
            raise SandbatchError(f"bind {source}", why, "see who writes to the allowed folder on the host")


def where(path: str, own: list[MountLine]) -> tuple[str, str]:
    """The device of a path and its place in that file system, as a bind of it shows them."""
    inside = PurePosixPath(path)
    mounts = [one for one in own if inside.is_relative_to(one.point)]
    top = max(mounts, key=lambda one: len(one.point.parts), default=MountLine("", "/", PurePosixPath("/")))
    uppermost = [one for one in mounts if one.point == top.point][-1:] or [top]
    return uppermost[0].device, str(PurePosixPath(uppermost[0].root) / inside.relative_to(top.point))


def _of_process(pid: int) -> list[MountLine]:
    return list(mount_lines(Path(f"/proc/{pid}/mountinfo")))


def _text(field: bytes) -> str:
    """Spaces and the like stand there as \\040."""
    return os.fsdecode(field.decode("unicode_escape").encode("latin-1"))
