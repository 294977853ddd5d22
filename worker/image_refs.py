"""What references led to when this host last resolved them: one small file each, by the reference's hash."""

import hashlib
import json
import os
import time
from pathlib import Path
from uuid import uuid4

from worker.image_ref import ImageRef

STRAY_S = 3600.0  # a reference may be noted a while before its image is here


class References:
    """A folder of such files. What is torn, or gone, is as if it had never been: it is resolved again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digest(self, ref: ImageRef) -> str:
        """What it led to; empty if nobody knows."""
        return _read(self._file(str(ref)))[1]

    def by_digest(self) -> dict[str, tuple[str, ...]]:
        """Digest -> the references that led to it, in order."""
        found: dict[str, list[str]] = {}
        for reference, digest in sorted(map(_read, self._files())):
            found.setdefault(digest, []).append(reference)
        return {digest: tuple(names) for digest, names in found.items() if digest}

    def note(self, ref: ImageRef, digest: str) -> None:
        file = self._file(str(ref))
        temporary = file.with_name(f".{file.name}.{os.getpid()}-{uuid4().hex[:8]}")
        try:
            temporary.write_text(json.dumps({"reference": str(ref), "digest": digest, "at": time.time()}))
            temporary.rename(file)  # unsynced: after a power cut it is resolved again
        finally:
            temporary.unlink(missing_ok=True)

    def forget(self, references: tuple[str, ...]) -> None:
        for reference in references:
            self._file(reference).unlink(missing_ok=True)

    def forget_strays(self, digests: set[str]) -> None:
        """Those that lead to none of these, for a while already."""
        for file in self._files(everything=True):
            try:
                is_old = file.lstat().st_mtime < time.time() - STRAY_S
            except FileNotFoundError:
                continue
            if is_old and _read(file)[1] not in digests:
                file.unlink(missing_ok=True)

    def _file(self, reference: str) -> Path:
        return self.folder / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"

    def _files(self, *, everything: bool = False) -> list[Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in names if everything or not name.startswith(".")]


def _read(file: Path) -> tuple[str, str]:
    """Reference and digest."""
    try:
        noted = json.loads(file.read_bytes())
        reference, digest = str(noted["reference"]), str(noted["digest"])
        (reference + digest).encode()  # half a pair of UTF-16 is no text
        return reference, digest
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "", ""
