"""Folders of work under way: locked while somebody works in them, removed whatever fails."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker import process
from worker.errors import ImageError, SandbatchError
from worker.locks import lock_within

log = logging.getLogger("sandbatch")
DELETE_S = 600.0
LOOK_S = 0.2  # between two looks whether what another process does is still wanted


@contextmanager
def held(folder: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Hold a folder's lock meanwhile; False if another holds it, or the folder is gone.

    What is no folder nobody can hold.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield os.path.lexists(folder)
        return
    try:
        yield lock_within(handle, wait_s) and _is_at(handle, folder)
    finally:
        unlock(handle)


@contextmanager
def working(place: Path, check: Callable[[], None]) -> Iterator[None]:
    """`place` as an empty folder of our own; whatever is in it at the end is removed, unless it was renamed.

    The kernel drops its lock with the process, so what a killed one left is taken for what it is.

    Args:
        check: Called while another process works there; it raises when the wait is over.
    """
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        with held(place, LOOK_S) as is_ours:
            if is_ours:
                for one in place.iterdir():
                    delete_tree(one)
                inode = place.stat().st_ino
                try:
                    yield
                finally:
                    if place.exists() and place.stat().st_ino == inode:
                        _delete_or_say(place)
                return
        check()


def unlock(handle: int) -> None:
    """Give a `flock` up and close its file; also for a child that was forked meanwhile and has it open."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _delete_or_say(place: Path) -> None:
    """What failed before is the error to see; what stays the audit finds, and the next start removes."""
    try:
        delete_tree(place)
    except (SandbatchError, OSError) as error:
        log.warning("%s", error)


def delete_tree(place: Path, timeout_s: float = DELETE_S) -> None:
    """By rm: a hostile tree may be deeper than Python recurses, and than a path is long.

    Raises:
        ImageError: rm's last words.
    """
    done = process.run(["rm", "-rf", "--one-file-system", "--", place], timeout_s=timeout_s)
    if done.returncode:
        raise ImageError(str(place), process.last_words(done.stderr), "remove it by hand")


def _is_at(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder))
    except FileNotFoundError:
        return False
