"""What lies where in a sandbox's root, looked up on the host before there is a sandbox."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

MOST_LINKS = 40  # as the kernel: too many levels
Step = Callable[[PurePosixPath, str, bool], bool]


@dataclass(frozen=True)
class Tree:
    """A root file system: a folder of the host, or the plan of one that is not made yet; and binds in it.

    `planned`: path without its first slash -> "dir", "file", or "-> TARGET" for a symlink.
    """

    folder: Path | None = None
    planned: Mapping[str, str] = field(default_factory=dict)
    binds: Mapping[str, Path] = field(default_factory=dict)

    def with_bind(self, target: str, source: Path) -> "Tree":
        return replace(self, binds={**self.binds, target: source})

    def look(self, path: PurePosixPath) -> str:
        """ "dir", "file" (or anything else that is no folder), "-> TARGET", "" for nothing."""
        here = self.host_side(path)
        if here is None:
            return "dir" if path == PurePosixPath("/") else self.planned.get(str(path).lstrip("/"), "")
        try:
            mode = here.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return ""
        if stat.S_ISLNK(mode):
            return f"-> {os.readlink(here)}"
        return "dir" if stat.S_ISDIR(mode) else "file"

    def follow(self, path: str) -> str:
        """As `look`; symlinks are followed inside the sandbox's root, never on the host."""
        real = self.real(path)
        return "" if real is None else self.look(real)

    def real(self, path: str, step: Step = lambda *_: True) -> PurePosixPath | None:
        """Where a path leads, by way of symlinks inside the root; None if they go round in circles.

        Args:
            step: Called for each name on the way that is no symlink, with what is there (as `look`) and
                whether it is the last; False ends the way, which then leads nowhere.
        """
        left, inside, links = list(PurePosixPath(path).parts[1:]), PurePosixPath("/"), 0
        while left:
            part = left.pop(0)
            if part == "..":
                inside = inside.parent
                continue
            kind = self.look(inside / part)
            if not kind.startswith("-> "):
                inside /= part
                if not step(inside, kind, not left):
                    return None
                continue
            links += 1
            if links > MOST_LINKS:
                return None
            target = PurePosixPath(kind.removeprefix("-> "))
            if target.is_absolute():
                inside = PurePosixPath("/")
            left = [part for part in target.parts if part not in ("/", "//")] + left
        return inside

    def host_side(self, path: PurePosixPath) -> Path | None:
        """Where it lies on the host; None where it is only planned."""
        for bind in self._binds_above(path):
            return self.binds[bind] / path.relative_to(bind)
        return None if self.folder is None else self.folder / path.relative_to("/")

    def is_in_bind(self, path: PurePosixPath) -> bool:
        return any(True for _ in self._binds_above(path))

    def _binds_above(self, path: PurePosixPath) -> Iterator[str]:
        """The innermost first."""
        return (bind for bind in sorted(self.binds, key=len, reverse=True) if path.is_relative_to(bind))
