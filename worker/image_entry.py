"""One image of the store: its folder, and the description in it."""

import hashlib
import json
import math
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.image_guard import Size

VERSION = "image/v1"
FILE, ROOTFS = "image.json", "rootfs"
MOST = 2**63  # of a number that is described
ENTRY = re.compile(r"^sha256-([0-9a-f]{64})$")


@dataclass(frozen=True)
class Image:
    """One image of this host. `config` is its whole OCI configuration; times in seconds since the epoch."""

    digest: str
    folder: Path
    config: dict[str, Any]
    size_bytes: int
    files: int
    dropped: int
    references: tuple[str, ...]
    pulled_at: float
    used_at: float
    fingerprint: str = ""

    @property
    def rootfs(self) -> Path:
        return self.folder / ROOTFS


def read_entry(folder: Path, references: tuple[str, ...]) -> Image | None:
    """The image in a folder of the store; None if there is none that can be used."""
    digest = folder.name.replace("-", ":")
    try:
        found = json.loads((folder / FILE).read_bytes())
        if found["kind"] != VERSION or found["digest"] != digest or not isinstance(found["config"], dict):
            return None
        if not stat.S_ISDIR((folder / ROOTFS).lstat().st_mode):
            return None
        pulled_at = float(found["pulled_at"])
        counts = [int(found[name]) for name in ("size_bytes", "files", "dropped")]
        if not (math.isfinite(pulled_at) and all(0 <= count <= MOST for count in counts)):
            return None
        return Image(
            digest=digest,
            folder=folder,
            config=found["config"],
            size_bytes=counts[0],
            files=counts[1],
            dropped=counts[2],
            references=references,
            pulled_at=pulled_at,
            used_at=_mtime(folder.with_name(f"{folder.name}.used"), pulled_at),
            fingerprint=str(found["fingerprint"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def write_entry(folder: Path, digest: str, config: dict[str, Any], size: Size, dropped: int) -> None:
    """Describe the tree in `folder`, as it is now and will stay."""
    about = {
        "kind": VERSION,
        "digest": digest,
        "config": config,
        "size_bytes": size.bytes,
        "files": size.files,
        "dropped": dropped,
        "fingerprint": fingerprint(folder / ROOTFS),
        "pulled_at": time.time(),
    }
    (folder / FILE).write_text(json.dumps(about))


def fingerprint(root: Path) -> str:
    """A hash of every name in a tree, with mode, owner, size, time of change and target: not of contents."""
    found, todo = hashlib.sha256(), [""]
    while todo:
        inside = todo.pop()
        for name in sorted(os.listdir(os.path.join(root, inside))):
            path = os.path.join(inside, name)
            info = os.lstat(os.path.join(root, path))
            is_folder, is_link = stat.S_ISDIR(info.st_mode), stat.S_ISLNK(info.st_mode)
            size = 0 if is_folder else info.st_size
            target = os.readlink(os.path.join(root, path)) if is_link else ""
            row = (path, info.st_mode, info.st_uid, info.st_gid, size, info.st_mtime_ns, target)
            found.update(repr(row).encode(errors="surrogateescape"))
            if is_folder:
                todo.append(path)
    return found.hexdigest()


def _mtime(file: Path, otherwise: float) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return otherwise
