"""The images of this host: each unpacked once, named by its manifest's digest, never written again.

    sha256-HEX/image.json, sha256-HEX/rootfs/   an image, renamed into place whole
    sha256-HEX.used                             its mtime: when a sandbox used it last
    refs/HEX.json                               what a reference led to, when it was last resolved here
    .pulling-HEX/, .removing-HEX.UNIQUE/        work under way: `flock`ed, or left over
    .lock                                       shared: a use begins; exclusive: one comes or goes

An image is in use if a journal has begun the stage `image` with its digest. A launch writes that
first and looks for the image then, under the lock; a removal reads the journals under the lock. So
one of the two always sees the other. The folder is root's alone: files of images may be setuid.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from worker import journal
from worker.errors import BadInput, ImageError
from worker.image_place import delete_tree, held, sync_folder
from worker.image_ref import ImageRef, is_digest, parse_image
from worker.limits import in_words
from worker.settings import Settings

VERSION = "image/v1"
FILE, ROOTFS, REFS = "image.json", "rootfs", "refs"
ENTRY = re.compile(r"^sha256-([0-9a-f]{64})$")
PULLING, REMOVING = ".pulling-", ".removing-"
PREFIX = re.compile(r"^(?:sha256:)?([0-9a-f]{6,64})$")
STAGE = "image"
STRAY_S = 3600.0  # a reference may be noted a while before its image is here


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

    @property
    def rootfs(self) -> Path:
        return self.folder / ROOTFS


class ImageStore:
    """The store of one host; any process of the host may use it, at the same time as others."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.images_dir

    # -- what is there -----------------------------------------------------------------------------

    def find(self, digest: str) -> Image | None:
        """The image with this digest; None if it is not here, or its description cannot be read."""
        return self._read(digest, self._references().get(digest, ())) if is_digest(digest) else None

    def lookup(self, ref: ImageRef) -> str | None:
        """The digest that a reference led to when it was last resolved here, if that image is still here."""
        digest = ref.digest or self._noted(self._ref_file(ref)).get("digest", "")
        return digest if self._read(digest, ()) is not None else None

    def all(self) -> list[Image]:
        """Every image, the one that was used last first."""
        references = self._references()
        digests = [f"sha256:{match[1]}" for match in map(ENTRY.match, self._names()) if match]
        found = [self._read(digest, references.get(digest, ())) for digest in digests]
        return sorted((one for one in found if one is not None), key=lambda one: (-one.used_at, one.digest))

    def users(self) -> dict[str, list[str]]:
        """Digest -> ids of the sandboxes that use it.

        Raises:
            ImageError: A journal cannot be read, so that nobody knows.
        """
        journals, errors = journal.read_all(self.settings.sandboxes_dir)
        for error in errors:
            folder = Path(error.what.removesuffix(f"/{journal.FILE}"))
            # A folder without a journal is one of a sandbox that has not begun anything.
            if os.path.lexists(folder / journal.FILE) or journal.set_aside_files(folder):
                raise ImageError(
                    "the images in use",
                    f"cannot be known: the journal of {folder.name} cannot be read",
                    "run sandbatch audit --mend on the host",
                )
        found: dict[str, list[str]] = {}
        for known in journals:
            digest = known.intents.get(STAGE, {}).get("digest") if STAGE in known.begun else None
            if digest:
                found.setdefault(digest, []).append(known.container_id)
        return found

    # -- a launch ----------------------------------------------------------------------------------

    def note(self, ref: ImageRef, digest: str) -> None:
        """Remember what a reference leads to."""
        file = self._ref_file(ref)
        self._make_folders()
        text = json.dumps({"reference": str(ref), "digest": digest, "at": time.time()})
        temporary = file.with_name(f".{file.name}.{os.getpid()}-{uuid4().hex[:8]}")
        try:
            temporary.write_text(text)
            temporary.rename(file)  # unsynced: after a power cut it is resolved again
        finally:
            temporary.unlink(missing_ok=True)

    def use(self, digest: str) -> Image:
        """The image for a sandbox whose journal names it already: it stays until that is undone.

        Raises:
            ImageError: It is not here (any more).
        """
        with self.locked(fcntl.LOCK_SH):
            image = self.find(digest)
            if image is None:
                raise ImageError(f"image {digest}", "is not on this host", "pull it", can_pass=True)
            self.touch(digest)
            return image

    def touch(self, digest: str) -> None:
        self._used_file(digest).touch()

    # -- what comes and goes -----------------------------------------------------------------------

    def put(self, place: Path, digest: str, size_bytes: int) -> None:
        """Give an image that is whole, and on the disk, its name; what was used longest ago makes room.

        Raises:
            ImageError: The limit of all images would be passed, whatever is removed.
        """
        with ExitStack() as gone, self.locked(fcntl.LOCK_EX):
            for one in self._too_many(size_bytes):
                self._take_away(one, gone)
            self._take_broken(digest, gone)
            place.rename(self.entry(digest))
            sync_folder(self.folder)
            self.touch(digest)

    def remove(self, words: str) -> Image:
        """Remove the image that a reference, or the first digits of a digest, names.

        Raises:
            BadInput: There is none, more than one, or it is in use; the words name its users.
        """
        with ExitStack() as gone, self.locked(fcntl.LOCK_EX):
            image = self._named(words)
            users = self.users().get(image.digest)
            if users:
                shown = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
                raise BadInput(f"image {words}", f"is in use by {shown}", "end these sandboxes first")
            self._take_away(image, gone)
        return image

    def prune(self, older_than_s: float) -> list[Image]:
        """Remove the images that no sandbox uses, nor has used for so long; returns them."""
        before = time.time() - older_than_s
        with ExitStack() as gone, self.locked(fcntl.LOCK_EX):
            users = self.users()
            found = [one for one in self.all() if one.digest not in users and one.used_at <= before]
            for image in found:
                self._take_away(image, gone)
        return found

    def make_room(self, size_bytes: int) -> list[Image]:
        """Remove what was used longest ago, until `size_bytes` more are within the limit.

        Raises:
            ImageError: They would not be, even without all images that nobody uses; then none is removed.
        """
        with ExitStack() as gone, self.locked(fcntl.LOCK_EX):
            found = self._too_many(size_bytes)
            for image in found:
                self._take_away(image, gone)
        return found

    def clean(self) -> list[str]:
        """Remove what killed pulls and removals have left; returns the names."""
        self._forget_strays()
        return [name for name in self._names() if name.startswith((PULLING, REMOVING)) and self._clear(name)]

    def left_over(self) -> list[str]:
        """Names of what killed pulls and removals have left."""
        found = []
        for name in self._names():
            if name.startswith((PULLING, REMOVING)):
                with held(self.folder / name) as is_ours:
                    found += [name] if is_ours else []
        return found

    # -- helpers -----------------------------------------------------------------------------------

    def entry(self, digest: str) -> Path:
        return self.folder / digest.replace(":", "-")

    def pulling(self, name: str) -> Path:
        """The folder of a pull under way, for `image_place.working`; `name`: the digest's hex digits."""
        self._make_folders()
        return self.folder / f"{PULLING}{name}"

    @contextmanager
    def locked(self, how: int) -> Iterator[None]:
        """Hold the store's lock, `fcntl.LOCK_SH` or `LOCK_EX`: always for a moment only."""
        self._make_folders()
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def _make_folders(self) -> None:
        if not (self.folder / REFS).is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / REFS).mkdir(mode=0o700, exist_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []

    def _used_file(self, digest: str) -> Path:
        return self.folder / f"{self.entry(digest).name}.used"

    def _ref_file(self, ref: ImageRef) -> Path:
        return self.folder / REFS / f"{hashlib.sha256(str(ref).encode()).hexdigest()}.json"

    def _references(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        folder = self.folder / REFS
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            noted = self._noted(folder / name)
            if noted:
                found[noted["digest"]] = tuple(sorted({*found.get(noted["digest"], ()), noted["reference"]}))
        return found

    def _noted(self, file: Path) -> dict[str, str]:
        try:
            noted = json.loads(file.read_bytes())
            return {"reference": str(noted["reference"]), "digest": str(noted["digest"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # torn, or gone: it is resolved again

    def _read(self, digest: str, references: tuple[str, ...]) -> Image | None:
        if not is_digest(digest):
            return None
        folder = self.entry(digest)
        try:
            found = json.loads((folder / FILE).read_bytes())
            if found["kind"] != VERSION or found["digest"] != digest or not isinstance(found["config"], dict):
                return None
            pulled_at = float(found["pulled_at"])
            return Image(
                digest,
                folder,
                found["config"],
                int(found["size_bytes"]),
                int(found["files"]),
                int(found["dropped"]),
                references,
                pulled_at,
                self._used_at(digest, pulled_at),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _used_at(self, digest: str, otherwise: float) -> float:
        try:
            return self._used_file(digest).stat().st_mtime
        except FileNotFoundError:
            return otherwise

    def _named(self, words: str) -> Image:
        images = self.all()
        match = PREFIX.match(words)
        found = [one for one in images if match and one.digest.startswith(f"sha256:{match[1]}")]
        if not found:
            with suppress(ValueError):
                ref = parse_image(words)
                found = [one for one in images if ref.digest == one.digest or str(ref) in one.references]
        if not found:
            raise BadInput(f"image {words}", "is not on this host", "see sandbatch images")
        if len(found) > 1:
            raise BadInput(f"image {words}", f"names {len(found)} images", "give more digits of the digest")
        return found[0]

    def _too_many(self, size_bytes: int) -> list[Image]:
        """Under the exclusive lock: what has to go for `size_bytes` more."""
        limit = self.settings.images_bytes
        images = self.all()
        too_much = sum(one.size_bytes for one in images) + size_bytes - limit
        if not limit or too_much <= 0:
            return []
        users, gone = self.users(), []
        for image in reversed(images):
            if too_much > 0 and image.digest not in users:
                gone.append(image)
                too_much -= image.size_bytes
        if too_much > 0:
            raise ImageError(
                "the images of this host",
                f"would be {in_words(too_much)} beyond their limit of {in_words(limit)}: the rest is in use",
                "set SANDBATCH_IMAGES_BYTES higher, or end sandboxes",
            )
        return gone

    def _take_away(self, image: Image, gone: ExitStack) -> None:
        """Under the exclusive lock: from now on nobody finds it; it is deleted when `gone` is closed."""
        self._take(image.folder, gone)
        self._used_file(image.digest).unlink(missing_ok=True)
        for reference in image.references:
            self._ref_file(parse_image(reference)).unlink(missing_ok=True)

    def _take_broken(self, digest: str, gone: ExitStack) -> None:
        """An entry without a description that can be read is none, and stands in the way."""
        folder = self.entry(digest)
        if os.path.lexists(folder) and self._read(digest, ()) is None:
            if digest in self.users():
                todo = "end the sandboxes that use it, then pull it again"
                raise ImageError(f"image {digest}", f"{folder} is broken, and in use", todo)
            self._take(folder, gone)

    def _take(self, folder: Path, gone: ExitStack) -> None:
        place = self.folder / f"{REMOVING}{folder.name.removeprefix('sha256-')}.{uuid4().hex[:8]}"
        gone.enter_context(held(folder))  # else it would look left over while we delete it
        gone.callback(delete_tree, place)
        folder.rename(place)

    def _clear(self, name: str) -> bool:
        with held(self.folder / name) as is_ours:
            if is_ours:
                delete_tree(self.folder / name)
            return is_ours

    def _forget_strays(self) -> None:
        """Small files that lead to nothing: they cost nothing but their names."""
        here, before = set(self._names()), time.time() - STRAY_S
        for file in (self.folder / REFS).iterdir() if REFS in here else ():
            entry = self.entry(self._noted(file).get("digest", "")).name
            if entry not in here and _mtime(file) < before:
                file.unlink(missing_ok=True)
        for name in here:
            if name.endswith(".used") and name.removesuffix(".used") not in here:
                (self.folder / name).unlink(missing_ok=True)


def _mtime(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except FileNotFoundError:
        return time.time()
