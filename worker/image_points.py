"""Mount points in an image's root, made before it is one of the store: it is never written later.

Whatever a path leads through, links too, is looked up inside that root, as the sandbox would.
"""

import errno
import os
from pathlib import Path, PurePosixPath
from typing import Any

from worker.tree import Tree

FOLDERS = ("/proc", "/sys", "/dev", "/dev/shm", "/tmp", "/run")  # noqa: S108 - the sandbox's own
FILES = ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname")
STICKY = ("/tmp", "/dev/shm")  # noqa: S108 - the sandbox's own
LONGEST_PATH, MOST_VOLUMES = 1024, 100


def make_points(root: Path, config: dict[str, Any]) -> list[str]:
    """Make what is missing of the usual mount points, and of the image's own; returns what cannot be made."""
    lacking = [path for path in FOLDERS if not make_point(root, path, is_file=False)]
    lacking += [path for path in FILES if not make_point(root, path, is_file=True)]
    return lacking + [path for path in _own(config) if not make_point(root, path, is_file=False)]


def make_point(root: Path, path: str, *, is_file: bool) -> bool:
    """A folder or an empty file at `path` inside `root`, unless something is there; False if it cannot be.

    Only real folders of the root are walked, one name at a time; `..` stops at the root.
    """
    try:
        return _make_point(root, path, is_file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        return False  # a name too long, a file in the way


def _make_point(root: Path, path: str, is_file: bool) -> bool:
    def step(inside: PurePosixPath, kind: str, is_last: bool) -> bool:
        wants_file = is_file and is_last
        if not kind:
            _make(root / inside.relative_to("/"), wants_file, path in STICKY and is_last)
            return True
        return (kind == "file") == wants_file

    return Tree(root).real(path, step) is not None


def _make(place: Path, is_file: bool, is_sticky: bool) -> None:
    """The modes are set apart from the making, which the umask changes."""
    if is_file:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        place.chmod(0o644)
    else:
        place.mkdir()
        place.chmod(0o1777 if is_sticky else 0o755)


def _own(config: dict[str, Any]) -> list[str]:
    """The image's working folder and its volumes, where these are paths at all."""
    about = config.get("config")
    about = about if isinstance(about, dict) else {}
    volumes = about.get("Volumes")
    found = [about.get("WorkingDir"), *(list(volumes)[:MOST_VOLUMES] if isinstance(volumes, dict) else [])]
    return [
        one
        for one in found
        if isinstance(one, str) and one.startswith("/") and one.isprintable() and len(one) <= LONGEST_PATH
    ]
