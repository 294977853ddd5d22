"""The image store compared with what it should be, for `sandbatch audit`, and put right, for `--mend`."""

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from worker.errors import SandbatchError
from worker.image_entry import fingerprint
from worker.image_guard import measure
from worker.image_store import PULLING, STAGE, ImageStore
from worker.journal import Journal
from worker.settings import Settings

log = logging.getLogger("sandbatch")
MODE = 0o700
START_S = 30.0  # the worker's start waits for it; what is left is for the next start, or for --mend
Found = tuple[str, str, str, str]  # name, problem, id of a sandbox, detail


def look(settings: Settings, journals: Iterable[Journal]) -> list[Found]:
    """What is wrong with the store; nothing is changed."""
    store, found = ImageStore(settings), []
    try:
        info = store.folder.lstat()
    except FileNotFoundError:
        info = None
    if info is not None:
        found += _folder(store.folder, info)
    for name in store.left_over():
        words = "a pull" if name.startswith(PULLING) else "a removal"
        detail = f"{words} was killed there; a worker removes it when it starts, or --mend"
        found.append((str(store.folder / name), "extra", "", detail))
    for folder in store.broken():
        words = "it has no description that can be read, and is never used; --mend removes it"
        found.append((str(folder), "unreadable", "", words))
    found += [(str(path), "extra", "", "it is none of the image store's") for path in store.strangers()]
    here = {image.digest for image in store.all()}
    for known in journals:
        digest = known.data.get(STAGE, {}).get("digest")
        is_due = digest and not known.is_unwinding and not known.is_stale and known.is_done(STAGE)
        if is_due and digest not in here:
            found.append((str(digest), "missing", known.container_id, "its journal says it is there"))
    return found


def _folder(folder: Path, info: os.stat_result) -> list[Found]:
    if not stat.S_ISDIR(info.st_mode):
        return [(str(folder), "changed", "", "it is no folder")]
    if stat.S_IMODE(info.st_mode) != MODE or info.st_uid != os.geteuid():
        words = (
            f"its mode is {stat.S_IMODE(info.st_mode):o}, its owner {info.st_uid}: other users reach setuid"
        )
        return [(str(folder), "changed", "", f"{words} files of images; --mend closes it")]
    return []


def put_right(settings: Settings) -> dict[str, str]:
    """Remove what nobody uses, close what is open; returns why something stays, by its name."""
    store = ImageStore(settings)
    reasons: dict[str, str] = {}
    if not store.folder.is_dir() or store.folder.is_symlink():
        return {}
    info = store.folder.stat()
    if stat.S_IMODE(info.st_mode) != MODE or info.st_uid != os.geteuid():
        os.chown(store.folder, os.geteuid(), os.getegid())
        store.folder.chmod(MODE)
    try:
        store.clean()
    except (SandbatchError, OSError) as error:
        reasons |= dict.fromkeys((str(store.folder / name) for name in store.left_over()), str(error))
    for folder in store.broken():
        try:
            store.remove_broken(folder)
        except (SandbatchError, OSError) as error:
            reasons[str(folder)] = str(error)
    return reasons


def at_start(settings: Settings) -> None:
    """Remove what a killed worker's pulls have left; errors are logged, and keep no worker from its work."""
    try:
        for name in ImageStore(settings).clean(START_S):
            log.info("removed %s, which a killed pull or removal had left", settings.images_dir / name)
    except (SandbatchError, OSError) as error:
        log.warning("%s", error)


def check_contents(settings: Settings) -> list[Found]:
    """For `audit --deep`: whether each image is what it was when it got its name."""
    store, found = ImageStore(settings), []
    for image in store.all():
        try:
            files, now = measure(image.rootfs).files, fingerprint(image.rootfs)
        except OSError as error:
            files, now = image.files, str(error)
        words = ""
        if files != image.files:
            words = f"it has {files} files, and had {image.files}"
        elif now != image.fingerprint:
            words = "something in it was changed: a size, time, mode or owner"
        if words and store.find(image.digest) is not None:  # else it was removed just now
            found.append((str(image.folder), "changed", "", words))
    return found
