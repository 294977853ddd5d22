"""A tar stream that a sandbox has made, unpacked without trust: it may be anything."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from worker.errors import SandbatchError

TODO = "nothing was written; look into the sandbox"


def unpack(stream: IO[bytes], base: str, target: Path) -> list[str]:
    """Unpack the file or folder `base` of the stream as `target`, by one rename.

    No link is made before all files are written, so that none is written through one.

    Returns:
        Names that were left out: devices, and links that lead out of what is copied.
    Raises:
        SandbatchError: A name leads out, or the stream is no tar, or says itself that it has failed;
            nothing was written.
    """
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:50]}.", dir=target.parent) as folder:
        root, links = Path(folder), list[tuple[Path, str]]()
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    parts = _parts(member.name, base)
                    _write(tar, member, root, root.joinpath(*parts), links, left_out)
            _drain(stream)
        except (tarfile.TarError, EOFError) as error:
            _drain(stream)
            raise SandbatchError("cp", f"what came is no whole tar: {error}", TODO) from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise SandbatchError("cp", f"a name is that of a file and of a folder: {error}", TODO) from None
        for place, aim in links:
            if os.path.lexists(place):
                left_out.append(place.name)
            else:
                place.symlink_to(aim)
        if not os.path.lexists(root / base):
            raise SandbatchError("cp", f"{base} did not come", TODO)
        if (root / base).is_dir() and not (root / base).is_symlink() and os.path.lexists(target):
            raise SandbatchError(f"cp to {target}", "it is there already", "remove it, or name another")
        os.replace(root / base, target)
    return left_out


def _drain(stream: IO[bytes]) -> None:
    """Read to the end: only there is it known whether the sandbox's tar was content, and what it said."""
    while stream.read(1 << 16):
        pass


def _parts(name: str, base: str) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] != base or ".." in parts:
        raise SandbatchError("cp", f"the name {name!r} leads out of {base}", TODO)
    return parts


def _write(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    root: Path,
    place: Path,
    links: list[tuple[Path, str]],
    left_out: list[str],
) -> None:
    try:
        clean = tarfile.data_filter(member, str(root))
    except tarfile.FilterError:  # a device, or a link that leads out: folders of a system have some
        left_out.append(member.name)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if clean.isdir():
        place.mkdir(exist_ok=True)
    elif clean.issym():
        links.append((place, clean.linkname))
    elif clean.islnk():
        aim = root.joinpath(*PurePosixPath(clean.linkname).parts)
        if aim.is_file():
            os.link(aim, place)
        else:
            left_out.append(member.name)
    elif (content := tar.extractfile(clean)) is not None:
        place.unlink(missing_ok=True)
        with place.open("xb") as out:
            shutil.copyfileobj(content, out, 1 << 16)
        place.chmod((0o644 if clean.mode is None else clean.mode) & 0o777)
        os.utime(place, (clean.mtime, clean.mtime))


class Source:
    """A file of what an iterator gives, as `tarfile` reads it."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest = parts, b""

    def read(self, count: int) -> bytes:
        while len(self._rest) < count:
            part = next(self._parts, b"")
            if not part:
                break
            self._rest += part
        data, self._rest = self._rest[:count], self._rest[count:]
        return data
