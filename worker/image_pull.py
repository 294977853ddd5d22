"""Bring an image to this host: skopeo fetches it, umoci unpacks it, a rename makes it one of the store.

Nothing of it is ever run here. What was begun lies in one folder under its lock, until it is whole;
a killed pull leaves that folder unlocked, and nobody ever uses it.
"""

import errno
import threading
from pathlib import Path

from worker import faults
from worker.errors import ImageError
from worker.image_entry import ROOTFS, Image, write_entry
from worker.image_fetch import TEMPORARY, Fetch, Progress, Tell, resolve
from worker.image_guard import Guard, measure
from worker.image_manifest import LAYOUT, NAME, read_config
from worker.image_place import delete_tree, working
from worker.image_points import make_points
from worker.image_ref import ImageRef
from worker.image_store import ImageStore
from worker.image_words import SPACE
from worker.settings import Settings
from worker.sync import sync_disk

__all__ = ["Progress", "Tell", "pull", "resolve"]


def pull(
    settings: Settings,
    ref: ImageRef,
    digest: str,
    *,
    timeout_s: float,
    progress: Tell,
    stop: threading.Event,
) -> Image:
    """The image of this digest, fetched and unpacked unless it is here; one process at a time does it.

    `stop` ends it at once, and so does the deadline. Safe to repeat.

    Raises:
        ImageError: It cannot be had; nothing of it is left.
    """
    store = ImageStore(settings)
    fetch = Fetch(settings, ref, digest, timeout_s, progress, stop)
    try:
        if store.find(digest) is None:
            place = store.pulling(digest.removeprefix("sha256:"))
            with working(place, fetch.check):
                if store.find(digest) is None:
                    _bring(store, fetch, place)
        store.note(ref, digest)
    except OSError as error:
        why = f"{error.strerror} ({error.filename or settings.images_dir})"
        todo = SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see the host's disk"
        raise ImageError(fetch.what, why, todo) from None
    image = store.find(digest)
    if image is None:
        raise ImageError(fetch.what, "was removed as soon as it was here", "pull it again", can_pass=True)
    return image


def _bring(store: ImageStore, fetch: Fetch, place: Path) -> None:
    fetch.run(place)
    layout, root = place / LAYOUT, place / ROOTFS
    config = read_config(fetch.what, layout)
    _unpack(fetch, Guard(store.settings, fetch.what), layout, root)
    delete_tree(layout)
    delete_tree(place / TEMPORARY)
    dropped = measure(root, drop=True).dropped
    make_points(root, config)
    size = measure(root)
    Guard(store.settings, fetch.what).judge(size)
    write_entry(place, fetch.digest, config, size, dropped)
    sync_disk(place)
    fetch.check()  # the sync may have taken its time
    faults.point("image.put.before")
    store.put(place, fetch.digest, size.bytes)
    faults.point("image.put.after")


def _unpack(fetch: Fetch, guard: Guard, layout: Path, root: Path) -> None:
    """As root: owners, setuid bits, capabilities as the image has them; our folder is root's alone."""

    def tick() -> None:
        fetch.check()
        guard.check_tree(root)

    fetch.tell("unpacking")
    fetch.program(["umoci", "raw", "unpack", "--image", f"{layout}:{NAME}", root], "umoci.unpack", tick)
    if root.is_symlink() or not root.is_dir():
        raise ImageError(fetch.what, "has a root that is no folder", "it is not used")
