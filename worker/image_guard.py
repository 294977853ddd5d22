"""Hostile images: how much of the disk one may take, and what of it may not stay.

The tree is walked by lstat alone, its links are never followed, and nothing else writes to it then.
"""

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.errors import ImageError
from worker.image_words import SPACE
from worker.limits import in_words
from worker.settings import Settings

# Beyond what launches need (tasks.puller): a pull is looked at only several times a second.
KEEP_FREE_BYTES, KEEP_FREE_FILES = 192 << 20, 2000
SHARE = 0.1  # of the time, at most, is spent on looking at a tree that grows


@dataclass
class Size:
    """Of a tree: what it takes of the disk, its files of all kinds, and what was dropped of it."""

    bytes: int = 0
    files: int = 0
    dropped: int = 0


def measure(root: Path, *, drop: bool = False, enough: Callable[[Size], bool] = lambda _: False) -> Size:
    """Walk a tree; hard links count once.

    Args:
        drop: Remove what is neither a folder, a file nor a symlink: device nodes, pipes, sockets.
        enough: Asked after each folder: True ends the walk.
    """
    size, seen, todo = Size(), set(), [os.fspath(root)]
    while todo and not enough(size):
        try:
            with os.scandir(todo.pop()) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            continue  # umoci has removed it again
        for entry in found:
            try:
                info = os.lstat(entry.path)
            except FileNotFoundError:
                continue
            kind = stat.S_IFMT(info.st_mode)
            if drop and kind not in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK):
                os.unlink(entry.path)
                size.dropped += 1
                continue
            size.files += 1
            if kind == stat.S_IFDIR:
                todo.append(entry.path)
            elif info.st_nlink > 1:
                if info.st_ino in seen:
                    continue
                seen.add(info.st_ino)
            size.bytes += info.st_blocks * 512
    return size


class Guard:
    """The limits of one image on one host."""

    def __init__(self, settings: Settings, what: str) -> None:
        self.settings, self.what = settings, what
        self._look_at = 0.0

    def check_sizes(self, total_bytes: int) -> None:
        """By the sizes that the manifest names, before anything of it is here.

        Raises:
            ImageError: It is too large for the settings, or for the disk as it is.
        """
        if total_bytes > self.settings.image_max_bytes:
            raise self._too_large(total_bytes)
        free = self._free_bytes()
        if total_bytes > free - KEEP_FREE_BYTES:
            raise ImageError(self.what, f"needs {in_words(total_bytes)}, and {_left(free)}", SPACE)

    def check_disk(self) -> None:
        """Meanwhile, often: what launches need stays free.

        Raises:
            ImageError: The disk is almost full.
        """
        found = os.statvfs(self.settings.images_dir)
        if found.f_bavail * found.f_frsize < KEEP_FREE_BYTES:
            free = found.f_bavail * found.f_frsize
            raise ImageError(self.what, f"does not fit: {_left(free)}", SPACE)
        if found.f_files and found.f_favail < KEEP_FREE_FILES:
            raise ImageError(self.what, f"does not fit: {found.f_favail} inodes are left on the disk", SPACE)

    def check_tree(self, root: Path, times: int = 1) -> None:
        """Meanwhile: the tree is within `times` the limits. It takes a small part of the time only.

        Raises:
            ImageError: It is not, or the disk is almost full.
        """
        self.check_disk()
        began = time.monotonic()
        if began >= self._look_at:
            self.judge(measure(root, enough=lambda size: self._is_too_much(size, times)), times)
            took_s = time.monotonic() - began
            self._look_at = began + took_s / SHARE

    def judge(self, size: Size, times: int = 1) -> None:
        """Raises:
        ImageError: This is too much for one image.
        """
        if size.bytes > times * self.settings.image_max_bytes:
            raise self._too_large(size.bytes)
        if size.files > times * self.settings.image_max_files:
            most = self.settings.image_max_files
            why, todo = f"has more than {most} files", "set SANDBATCH_IMAGE_MAX_FILES higher, if you trust it"
            raise ImageError(self.what, why, todo)

    def _is_too_much(self, size: Size, times: int) -> bool:
        one = self.settings
        return size.bytes > times * one.image_max_bytes or size.files > times * one.image_max_files

    def _too_large(self, size_bytes: int) -> ImageError:
        most = in_words(self.settings.image_max_bytes)
        return ImageError(
            self.what,
            f"is larger than an image may be ({most}): {in_words(size_bytes)} at least",
            "set SANDBATCH_IMAGE_MAX_BYTES higher, if you trust it",
        )

    def _free_bytes(self) -> int:
        found = os.statvfs(self.settings.images_dir)
        return found.f_bavail * found.f_frsize


def _left(free_bytes: int) -> str:
    return (
        f"{in_words(free_bytes)} are left on the disk, and {in_words(KEEP_FREE_BYTES)} of it must stay free"
    )
