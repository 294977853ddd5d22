"""skopeo at work: which manifest a reference leads to, and its blobs into an OCI layout; with retries."""

import hashlib
import json
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from worker import process
from worker.errors import ImageError, ProcessTimeout, SandbatchError
from worker.image_guard import Guard
from worker.image_manifest import LAYOUT, NAME, SMALL, own_digest, parsed, total_size
from worker.image_place import working
from worker.image_ref import ImageRef
from worker.image_store import ImageStore
from worker.image_words import meaning
from worker.settings import Settings

TEMPORARY = "tmp"
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 5, 1.0, 20.0
STALL_S = 60.0  # a connection that brings nothing for so long is given up, and another tried
TELL_S = 0.5
MOST_KNOWN, LONGEST_KNOWN = 64, 64 << 10
ENDED = "its pull was ended: nobody waits for it any more"

_known: dict[str, bytes] = {}  # manifests of registries by digest, from the resolve to the pull


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
    """The digest that a reference leads to now; one that names its digest is not asked for.

    Raises:
        ImageError: It leads to none, or cannot be asked for, in at most 5 tries.
    """
    if ref.digest:
        return ref.digest
    fetch = Fetch(settings, ref, "", timeout_s, lambda _: None, stop)
    raw = fetch.local_manifest() if not ref.is_remote else fetch.manifest(ref.source(), "resolving")
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    while len(_known) >= MOST_KNOWN:
        _known.pop(next(iter(_known)), None)
    if ref.is_remote and len(raw) <= LONGEST_KNOWN:
        _known[digest] = raw
    return digest


class Fetch:
    """One pull under way: what it is of, until when, whom it tells."""

    def __init__(
        self,
        settings: Settings,
        ref: ImageRef,
        digest: str,
        timeout_s: float,
        progress: Tell,
        stop: threading.Event,
    ) -> None:
        self.settings, self.ref, self.digest, self.stop = settings, ref, digest, stop
        self.what = f"image {ref}"
        self._deadline = time.monotonic() + timeout_s
        self._tell = progress
        self._last = Progress("pulling", 0, None, 1, "")

    def run(self, place: Path) -> None:
        """Fetch it into an OCI layout in `place`.

        Raises:
            ImageError: It cannot be had, or is too large.
        """
        guard, temporary = Guard(self.settings, self.what), place / TEMPORARY
        temporary.mkdir(mode=0o700)
        total = self._total_bytes(temporary)
        self._last = replace(self._last, total_bytes=total)
        guard.check_sizes(total or 0)
        argv = self._skopeo(
            "copy",
            "--quiet",
            "--dest-compress-format=gzip",  # umoci 0.4 knows no zstd; what is gzip stays as it is
            self.ref.source(self.digest),
            f"oci:{place / LAYOUT}:{NAME}",
            temporary=temporary,
        )
        self._retry("pulling", lambda: self.program(argv, "skopeo.copy", self._watch(guard, place)))

    def manifest(self, source: str, phase: str, temporary: Path | None = None) -> bytes:
        """The manifest, or index, as it is: its SHA-256 is its digest.

        Raises:
            ImageError: There is none, or it cannot be one.
        """
        argv = self._skopeo("inspect", "--raw", source, temporary=temporary)
        raw = self._retry(phase, lambda: self.program(argv, "skopeo.inspect", self.check))
        found = parsed(raw)
        if not found:
            raise ImageError(self.what, "its manifest is none of an image", "see where it comes from")
        if found.get("schemaVersion") == 1:
            raise ImageError(self.what, "is in docker's oldest format (schema 1)", "build and push it again")
        return raw

    def local_manifest(self) -> bytes:
        """That of a folder or archive; skopeo unpacks an archive for it, into a folder that goes again."""
        self._check_path()
        store = ImageStore(self.settings)
        place = store.pulling(f"resolve-{uuid4().hex}")
        with working(place, self.check):
            return self.manifest(self.ref.source(), "resolving", place)

    def check(self) -> None:
        """Raises:
        ImageError: Nobody waits for it any more, or its time is over.
        """
        if self.stop.is_set():
            raise ImageError(self.what, ENDED)
        if time.monotonic() >= self._deadline:
            raise self._late()

    def tell(self, phase: str, done_bytes: int = 0, words: str = "") -> None:
        self._last = replace(self._last, phase=phase, done_bytes=done_bytes, words=words)
        self._tell(self._last)

    def program(self, argv: list[str | Path], point: str, tick: Callable[[], None]) -> bytes:
        """Run a program to its end, or until `tick` raises; returns what it prints.

        Raises:
            ImageError: It failed, in words for people.
        """
        self.check()
        try:
            done = process.run(
                argv,
                timeout_s=max(0.1, self._deadline - time.monotonic()),
                point=point,
                tick=tick,
                largest_file=self.settings.image_max_bytes,
            )
        except ProcessTimeout:
            raise self._late() from None
        except ImageError:
            raise
        except SandbatchError as error:
            raise ImageError(self.what, f"{error.what} {error.why}", error.todo) from None
        if done.returncode:
            raise meaning(self.what, done.stderr or f"{argv[0]} ended with status {done.returncode}")
        return done.raw

    # -- helpers -----------------------------------------------------------------------------------

    def _retry(self, phase: str, act: Callable[[], bytes]) -> bytes:
        while True:
            self.tell(phase)
            try:
                return act()
            except ImageError as error:
                tries = self._last.tries
                wait_s = min(FIRST_WAIT_S * 2 ** (tries - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1)  # noqa: S311
                if not error.can_pass or tries >= TRIES or time.monotonic() + wait_s >= self._deadline:
                    if tries == 1:
                        raise
                    why = f"{error.why} ({tries} tries)"
                    raise ImageError(self.what, why, error.todo, error.can_pass) from None
                self._last = replace(self._last, tries=tries + 1)
                self.tell("waiting", words=error.why)
                self.stop.wait(wait_s)
                self.check()

    def _total_bytes(self, temporary: Path) -> int | None:
        """What the manifest says of its layers; of a folder or archive it must still be the manifest."""
        source, is_remote = self.ref.source(self.digest), self.ref.is_remote
        if not is_remote:
            self._check_path()
        raw = _known.get(self.digest, b"") if is_remote else b""
        raw = raw or self.manifest(source, "pulling", temporary)
        found = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if found != self.digest:
            why = f"is {found[:19]}… by now, and {self.digest[:19]}… is asked for"
            todo = "nothing of it is used; " + (
                "ask who runs the registry" if is_remote else "its files have changed"
            )
            raise ImageError(self.what, why, todo)
        about = parsed(raw)
        child = own_digest(self.what, about)
        if child:
            if not is_remote:
                return None
            about = parsed(self.manifest(f"docker://{self.ref.name}@{child}", "pulling"))
        return total_size(self.what, about)

    def _watch(self, guard: Guard, place: Path) -> Callable[[], None]:
        seen, since, told = -1, time.monotonic(), 0.0
        times = 1 if self.ref.is_remote else 2  # skopeo unpacks an archive before it copies

        def tick() -> None:
            nonlocal seen, since, told
            self.check()
            guard.check_tree(place, times)
            done, now = _fetched(place), time.monotonic()
            if done != seen:
                seen, since = done, now
                if now - told >= TELL_S:
                    told = now
                    total = self._last.total_bytes
                    self.tell("pulling", min(done, total) if total else done)
            elif now - since > STALL_S:
                raise ImageError(
                    self.what, f"nothing came for {STALL_S:g} s", "see the network", can_pass=True
                )

        return tick

    def _skopeo(self, verb: str, *args: str, temporary: Path | None) -> list[str | Path]:
        conf, auth = self.settings.registries_conf, self.settings.registry_auth_file
        before: list[str | Path] = ["--registries-conf", conf] if conf else []
        before += ["--tmpdir", temporary] if temporary else []
        login: list[str | Path] = ["--authfile", auth] if auth else []
        return ["skopeo", *before, verb, *login, *args]

    def _check_path(self) -> None:
        """Before skopeo opens it: a pipe would keep it for ever; and a layout says what it has."""
        path, is_layout = Path(self.ref.name), self.ref.transport == "oci"
        allowed = [folder.resolve() for folder in self.settings.image_allow]
        if not any(path.resolve().is_relative_to(folder) for folder in allowed):
            known = ", ".join(map(str, allowed)) or "none"
            why = f"lies in no folder that this host allows for images (allowed: {known})"
            raise ImageError(self.what, why, "set SANDBATCH_IMAGE_ALLOW on the host")
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise ImageError(self.what, f"{error.strerror} on this host", "give a path of the host") from None
        if not (stat.S_ISDIR(mode) if is_layout else stat.S_ISREG(mode)):
            raise ImageError(self.what, f"{path} is no {'folder' if is_layout else 'file'}", "see the path")
        if is_layout:
            tags = _tags(path)
            if tags is not None and (len(tags) != 1 if not self.ref.tag else self.ref.tag not in tags):
                names = ", ".join(sorted(filter(None, tags))[:10])
                why = f"there are {len(tags)} images in {path}"
                if self.ref.tag:
                    why = f"no image in {path} has the tag {self.ref.tag}"
                raise ImageError(
                    self.what, why, f"name one of its tags: {names}" if names else "none has a tag"
                )

    def _late(self) -> ImageError:
        words = f" ({self._last.words})" if self._last.words else ""
        return ImageError(self.what, f"was not here in time{words}", "set SANDBATCH_PULL_TIMEOUT_S higher")


def _fetched(place: Path) -> int:
    """Bytes in the layout, also of what is still coming (oci-put-blob…)."""
    done = 0
    for folder in (place / LAYOUT, place / LAYOUT / "blobs" / "sha256"):
        try:
            with os.scandir(folder) as entries:
                done += sum(one.stat(follow_symlinks=False).st_size for one in entries if one.is_file())
        except FileNotFoundError:
            continue  # not made yet, or renamed just now
    return done


def _tags(layout: Path) -> list[str] | None:
    """Of each image of a layout, "" where it has none; None if skopeo is to say what is wrong with it."""
    try:
        with (layout / "index.json").open("rb") as file:
            images = json.loads(file.read(SMALL))["manifests"]
        names = [one.get("annotations", {}).get("org.opencontainers.image.ref.name", "") for one in images]
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
