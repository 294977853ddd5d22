"""A writable root: gVisor's own overlay over the shared one, in memory or on the host's disk.

Never `self`, which would keep the writes in a file inside the shared root. With `dir=` runsc keeps
them in one file that it unlinks at once, so the kernel frees it with the sandbox; only a kill in
between leaves a name, in a folder below the bundle, which the bundle's undo removes.
"""

import os
from pathlib import Path

from worker.errors import BadInput, SandbatchError
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import Spec

FOLDER = "overlay"  # in the bundle
PROMISE = "bytes"  # in that folder: how much of the disk its sandbox may take
TOO_OLD = "take a release of 2025 or later, see runsc in the README"


def check_overlay(spec: Spec, runsc: Runsc) -> None:
    """Refuse what this runsc cannot hold to its limit.

    Raises:
        BadInput: It has no limit for a writable root; on disk there must be one.
    """
    if spec.writable == "no" or runsc.limits_overlay:
        return
    if spec.writable == "disk":
        why = "this host's runsc cannot limit what it takes of the disk"
        raise BadInput("writable root on disk", why, f"{TOO_OLD}, or say memory")
    if spec.writable_bytes is not None:
        why = "this host's runsc cannot limit a writable root"
        raise BadInput("writable_bytes", why, f"leave it to the sandbox's memory limit, or {TOO_OLD}")


def overlay_flag(spec: Spec, bundle_dir: Path, settings: Settings) -> str:
    """The value of runsc's flag --overlay2."""
    if spec.writable == "no":
        return "none"
    size = _bytes(spec, settings)
    medium = "memory" if spec.writable == "memory" else f"dir={bundle_dir / FOLDER}"
    return f"root:{medium}" + (f",size={size}" if size is not None else "")


def make_overlay_folder(spec: Spec, bundle_dir: Path, settings: Settings) -> None:
    """Make the folder for a root on disk, and see that the disk can hold what was promised to all.

    The own promise is written before the others are read: of two launches at once at least one sees
    both. What a sandbox has written already counts twice, so that the check errs on the safe side.

    Raises:
        SandbatchError: The disk has too little room.
    """
    size = _bytes(spec, settings)
    if spec.writable != "disk" or size is None:
        return
    folder = bundle_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / PROMISE).write_text(str(size))
    promised = sum(map(_promise, settings.sandboxes_dir.glob(f"*/bundle/{FOLDER}/{PROMISE}")))
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if promised > free:
        why = f"{promised >> 20} MiB are promised to sandboxes, and the host's disk has {free >> 20} MiB free"
        raise SandbatchError("writable root on disk", why, "ask for less, or make room")


def _bytes(spec: Spec, settings: Settings) -> int | None:
    if spec.writable == "disk" and spec.writable_bytes is None:
        return settings.writable_disk_bytes
    return spec.writable_bytes


def _promise(file: Path) -> int:
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0  # its sandbox has just ended
