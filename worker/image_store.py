"""The images of this host: each unpacked once, named by its manifest's digest, never written again.

    sha256-HEX/image.json, sha256-HEX/rootfs/   an image, renamed into place whole
    sha256-HEX.used                             its mtime: when a sandbox used it last
    refs/HEX.json                               what a reference led to (`worker.image_refs`)
    .pulling-HEX/, .removing-HEX.UNIQUE/        work under way: `flock`ed, or left over
    .lock                                       shared: a use begins; exclusive: one comes or goes

An image is in use if a journal has begun the stage `image` with its digest. A launch writes that
first and looks for the image then, under the lock; a removal reads the journals under the lock. So
one of the two always sees the other. The folder is root's alone: files of images may be setuid.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from worker import journal
from worker.errors import BadInput, ImageError
from worker.image_entry import ENTRY, Image, read_entry
from worker.image_place import DELETE_S, delete_tree, held, unlock
from worker.image_ref import ImageRef, is_digest, parse_image
from worker.image_refs import References
from worker.limits import in_words
from worker.settings import Settings
from worker.sync import sync_folder

__all__ = ["Image", "ImageStore"]

PULLING, REMOVING, USED = ".pulling-", ".removing-", ".used"
OURS = re.compile(
    rf"^(?:\.lock|refs|lost\+found|sha256-[0-9a-f]{{64}}(?:\{USED})?|\.(?:pulling|removing)-.*)$"
)
PREFIX = re.compile(r"^(?:sha256:)?([0-9a-f]{6,64})$")
STAGE = "image"


class ImageStore:
    """The store of one host; any process of the host may use it, at the same time as others."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.images_dir
        self._references = References(self.folder / "refs")

    # -- what is there -----------------------------------------------------------------------------

    def find(self, digest: str) -> Image | None:
        """The image with this digest; None if it is not here, or its description cannot be read."""
        if not is_digest(digest):
            return None
        return read_entry(self.entry(digest), self._references.by_digest().get(digest, ()))

    def lookup(self, ref: ImageRef) -> str | None:
        """The digest that a reference led to when it was last resolved here, if that image is still here."""
        digest = ref.digest or self._references.digest(ref)
        return digest if is_digest(digest) and read_entry(self.entry(digest), ()) else None

    def all(self) -> list[Image]:
        """Every image, the one that was used last first."""
        references = self._references.by_digest()
        names = [(name, f"sha256:{match[1]}") for name in self._names() if (match := ENTRY.match(name))]
        found = [read_entry(self.folder / name, references.get(digest, ())) for name, digest in names]
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
            if STAGE not in known.begun:
                continue
            # A pull begins before its digest is known; once it has ended, the facts have it.
            digest = known.intents[STAGE].get("digest") or known.facts.get("image_digest")
            if digest:
                found.setdefault(digest, []).append(known.container_id)
        return found

    def left_over(self) -> list[str]:
        """Names of what killed pulls and removals have left."""
        found = []
        for name in self._names():
            if name.startswith((PULLING, REMOVING)):
                with held(self.folder / name) as is_ours:
                    found += [name] if is_ours else []
        return found

    def broken(self) -> list[Path]:
        """Entries that nobody can use."""
        folders = [self.folder / name for name in self._names() if ENTRY.match(name)]
        return [one for one in folders if read_entry(one, ()) is None and os.path.lexists(one)]

    def strangers(self) -> list[Path]:
        """What is none of ours."""
        return [self.folder / name for name in self._names() if not OURS.match(name)]

    # -- a launch ----------------------------------------------------------------------------------

    def note(self, ref: ImageRef, digest: str) -> None:
        """Remember what a reference leads to."""
        self._make_folders()
        self._references.note(ref, digest)

    def use(self, digest: str) -> Image:
        """The image for a sandbox whose journal names it already: it stays until that is undone.

        Raises:
            ImageError: It is not here (any more).
        """
        with self._locked(fcntl.LOCK_SH):
            image = self.find(digest)
            if image is None:
                raise ImageError(f"image {digest}", "is not on this host", "pull it", can_pass=True)
            self._used_file(image.folder).touch()
            return image

    # -- what comes and goes -----------------------------------------------------------------------

    def pulling(self, name: str) -> Path:
        """The folder of a pull under way, for `image_place.working`; `name`: the digest's hex digits."""
        self._make_folders()
        return self.folder / f"{PULLING}{name}"

    def entry(self, digest: str) -> Path:
        return self.folder / digest.replace(":", "-")

    def put(self, place: Path, digest: str, size_bytes: int) -> None:
        """Give an image that is whole, and on the disk, its name; what was used longest ago makes room.

        Raises:
            ImageError: The limit of all images would be passed, whatever is removed.
        """
        folder = self.entry(digest)
        with ExitStack() as gone, self._locked(fcntl.LOCK_EX):
            for one in self._too_many(size_bytes):
                self._take_away(one, gone)
            if os.path.lexists(folder):  # else it would be found, and no pull be asked for
                self._take_broken(folder, gone)
            place.rename(folder)
            sync_folder(self.folder)
            self._used_file(folder).touch()

    def remove(self, words: str) -> Image:
        """Remove the image that a reference, or the first digits of a digest, names.

        Raises:
            BadInput: There is none, more than one, or it is in use; the words name its users.
        """
        with ExitStack() as gone, self._locked(fcntl.LOCK_EX):
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
        with ExitStack() as gone, self._locked(fcntl.LOCK_EX):
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
        with ExitStack() as gone, self._locked(fcntl.LOCK_EX):
            found = self._too_many(size_bytes)
            for image in found:
                self._take_away(image, gone)
        return found

    def clean(self, timeout_s: float = DELETE_S) -> list[str]:
        """Remove what killed pulls and removals have left; returns the names.

        Raises:
            ImageError: rm's words, or it takes longer than `timeout_s`.
        """
        self._forget_strays()
        deadline, cleaned = time.monotonic() + timeout_s, []
        for name in self.left_over():
            with held(self.folder / name) as is_ours:
                if is_ours:
                    delete_tree(self.folder / name, max(0.1, deadline - time.monotonic()))
                    cleaned.append(name)
        return cleaned

    def remove_broken(self, folder: Path) -> None:
        """Remove an entry that nobody can use.

        Raises:
            ImageError: A journal has it.
        """
        with ExitStack() as gone, self._locked(fcntl.LOCK_EX):
            self._take_broken(folder, gone)

    # -- helpers -----------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Hold the store's lock, `fcntl.LOCK_SH` or `LOCK_EX`: always for a moment only."""
        self._make_folders()
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            unlock(handle)

    def _make_folders(self) -> None:
        if not self._references.folder.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._references.folder.mkdir(mode=0o700, exist_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _used_file(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}{USED}")

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
        images = self.all() if limit else []
        too_much = sum(one.size_bytes for one in images) + size_bytes - limit
        if not limit or too_much <= 0:
            return []
        users, gone = self.users(), []
        for image in reversed(images):
            if too_much > 0 and image.digest not in users:
                gone.append(image)
                too_much -= image.size_bytes
        if too_much > 0:
            why = f"would be {in_words(too_much)} beyond their limit of {in_words(limit)}"
            why += ": the rest is in use" if users else ""
            raise ImageError("the images of this host", why, "set SANDBATCH_IMAGES_BYTES higher")
        return gone

    def _take_away(self, image: Image, gone: ExitStack) -> None:
        """Under the exclusive lock: from now on nobody finds it; it is deleted when `gone` is closed."""
        self._take(image.folder, gone)
        self._references.forget(image.references)

    def _take_broken(self, folder: Path, gone: ExitStack) -> None:
        if read_entry(folder, ()) is not None:
            return  # somebody has put a good one there
        digest = folder.name.replace("-", ":")
        if digest in self.users():
            todo = "end the sandboxes that use it, then pull it again"
            raise ImageError(f"image {digest}", f"{folder} is broken, and in use", todo)
        self._take(folder, gone)

    def _take(self, folder: Path, gone: ExitStack) -> None:
        place = self.folder / f"{REMOVING}{folder.name.removeprefix('sha256-')}.{uuid4().hex[:8]}"
        gone.enter_context(held(folder))  # else it would look left over while we delete it
        gone.callback(delete_tree, place)
        folder.rename(place)
        self._used_file(folder).unlink(missing_ok=True)

    def _forget_strays(self) -> None:
        """Small files that lead to nothing: they cost nothing but their names."""
        with self._locked(fcntl.LOCK_EX):
            names = self._names()
            entries = {name for name in names if ENTRY.match(name)}
            for name in names:
                if name.endswith(USED) and name.removesuffix(USED) not in entries:
                    (self.folder / name).unlink(missing_ok=True)
            self._references.forget_strays({name.replace("-", ":") for name in entries})
