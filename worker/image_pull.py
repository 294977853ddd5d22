"""Bring an image to this host: skopeo fetches it, umoci unpacks it, a rename makes it one of the store.

Nothing of it is ever run here. What was begun lies in one folder under its lock, until it is whole;
a killed pull leaves that folder unlocked, and nobody ever uses it.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import process
from worker.errors import ImageError
from worker.image_ref import ImageRef
from worker.image_store import FILE, ROOTFS, VERSION, Image, ImageStore, delete_tree, is_at
from worker.locks import lock_within
from worker.settings import Settings

LAYOUT, NAME = "oci", "x"
WAIT_S = 0.2


@dataclass(frozen=True)
class Progress:
    """How far a pull is: `phase` is resolving, pulling, unpacking or waiting (for another try)."""

    phase: str
    done_bytes: int
    total_bytes: int | None
    tries: int
    words: str


Tell = Callable[[Progress], None]


def resolve(settings: Settings, ref: ImageRef, timeout_s: float, stop: threading.Event) -> str:
    """The digest that a reference leads to now.

    Raises:
        ImageError: It leads to none, or the registry cannot be asked.
    """
    return f"sha256:{hashlib.sha256(_manifest(settings, ref.source(), timeout_s, stop)).hexdigest()}"


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

    Raises:
        ImageError: It cannot be had; nothing of it is left.
    """
    store, deadline = ImageStore(settings), time.monotonic() + timeout_s
    image = store.find(digest)
    if image is None:
        with _working(store, digest, deadline, stop) as place:
            image = store.find(digest)
            if image is None:
                _fetch(settings, ref, digest, place, deadline, progress, stop)
                progress(Progress("unpacking", 0, None, 1, ""))
                size = _unpack(place, digest, deadline, stop)
                store.put(place, digest, size)
    store.note(ref, digest)
    found = store.find(digest)
    if found is None:
        raise ImageError(f"image {ref}", "was removed while it was pulled", "pull it again", can_pass=True)
    return found


@contextmanager
def _working(store: ImageStore, digest: str, deadline: float, stop: threading.Event) -> Iterator[Path]:
    """An empty folder of our own, locked; what is still there at the end is removed."""
    while True:
        place = store.pulling(digest)
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not lock_within(handle, WAIT_S):
                _check(digest, deadline, stop)
                continue
            if not is_at(handle, place):
                continue
            try:
                for one in place.iterdir():
                    delete_tree(one)
                yield place
            finally:
                if is_at(handle, place):
                    delete_tree(place)
            return
        finally:
            os.close(handle)


def _check(what: object, deadline: float, stop: threading.Event) -> None:
    if stop.is_set():
        raise ImageError(f"image {what}", "its pull was ended: nobody waits for it any more")
    if time.monotonic() > deadline:
        raise ImageError(f"image {what}", "was not pulled in time", "set SANDBATCH_PULL_TIMEOUT_S higher")


def _skopeo(settings: Settings, verb: str, *args: str | Path) -> list[str | Path]:
    conf, auth = settings.registries_conf, settings.registry_auth_file
    before: list[str | Path] = ["--registries-conf", conf] if conf else []
    login: list[str | Path] = ["--authfile", auth] if auth else []
    return ["skopeo", *before, verb, *login, *args]


def _run(argv: list[str | Path], what: str, deadline: float, stop: threading.Event) -> bytes:
    def tick() -> None:
        _check(what, deadline, stop)

    done = process.run(argv, timeout_s=max(0.1, deadline - time.monotonic()), tick=tick)
    if done.returncode:
        raise ImageError(f"image {what}", process.last_words(done.stderr))
    return done.raw


def _manifest(settings: Settings, source: str, timeout_s: float, stop: threading.Event) -> bytes:
    argv = _skopeo(settings, "inspect", "--raw", source)
    return _run(argv, source, time.monotonic() + timeout_s, stop)


def _fetch(
    settings: Settings,
    ref: ImageRef,
    digest: str,
    place: Path,
    deadline: float,
    progress: Tell,
    stop: threading.Event,
) -> None:
    progress(Progress("pulling", 0, None, 1, ""))
    argv = _skopeo(settings, "copy", "--quiet", ref.source(digest), f"oci:{place / LAYOUT}:{NAME}")
    _run(argv, str(ref), deadline, stop)


def _unpack(place: Path, digest: str, deadline: float, stop: threading.Event) -> int:
    argv: list[str | Path] = ["umoci", "raw", "unpack", "--image", f"{place / LAYOUT}:{NAME}", place / ROOTFS]
    _run(argv, digest, deadline, stop)
    config = _config(place / LAYOUT)
    delete_tree(place / LAYOUT)
    size = files = 0
    for folder, folders, names in os.walk(place / ROOTFS):
        files += len(folders) + len(names)
        size += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in names)
    about = {
        "kind": VERSION,
        "digest": digest,
        "config": config,
        "size_bytes": size,
        "files": files,
        "dropped": 0,
        "pulled_at": time.time(),
    }
    (place / FILE).write_text(json.dumps(about))
    return size


def _config(layout: Path) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(_blob(layout, index["manifests"][0]["digest"]))
    return dict(json.loads(_blob(layout, manifest["config"]["digest"])))


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()
