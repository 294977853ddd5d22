"""Who a sandbox runs as: names of users and groups, looked up in the image's own files.

The files are hostile: they are read from the root as the sandbox sees it (links never lead out of it), up to
a size, and a line that says nothing is passed over, as the C libraries do.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from worker.errors import ImageError
from worker.spec import MOST_ID
from worker.tree import Tree

PASSWD, GROUP = "/etc/passwd", "/etc/group"
MOST_BYTES = 1 << 20  # of one of the files; more is passed over
MOST_GROUPS = 64
LONGEST_HOME = 1024


@dataclass(frozen=True)
class User:
    """Numbers of a user, and its home; `/` where nobody knows of one."""

    uid: int
    gid: int
    groups: list[int] = field(default_factory=list)  # besides gid
    home: str = "/"


def find_user(root: Path, words: str) -> User:
    """`USER[:GROUP]`, names or numbers, as docker reads it; "" is root.

    A user that the image knows brings its group, its other groups unless GROUP is given, and its home.

    Raises:
        ImageError: A name that the image does not know, or a number that is none.
    """
    name, _, group = (words or "0").partition(":")
    entry = next((one for one in _entries(root, PASSWD, 6) if one[0] == name), None)
    if entry is None and name.isascii() and name.isdigit():
        number = str(int(name[:11]))
        entry = next((one for one in _entries(root, PASSWD, 6) if one[2] == number), None)
    if entry is None:
        user = User(_number(name, "user", PASSWD), 0)
    else:
        groups = [int(one[2]) for one in _entries(root, GROUP, 4) if entry[0] in one[3].split(",")]
        home = entry[5] if entry[5].startswith("/") and len(entry[5]) <= LONGEST_HOME else "/"
        user = User(int(entry[2]), int(entry[3]), groups[:MOST_GROUPS], home)
    if not group:
        return user
    found = next((int(one[2]) for one in _entries(root, GROUP, 4) if one[0] == group), None)
    gid = _number(group, "group", GROUP) if found is None else found
    return User(user.uid, gid, [], user.home)


def _is_id(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 10 and int(word) <= MOST_ID


def _number(word: str, what: str, file: str) -> int:
    if _is_id(word):
        return int(word)
    raise ImageError(
        f"{what} {word[:80]!r}", f"is not in the image's {file}", "name one that is, or a number"
    )


def _entries(root: Path, path: str, count: int) -> Iterator[list[str]]:
    """Lines of `count` fields or more whose numbers are numbers."""
    for line in _text(root, path).splitlines():
        fields = line.split(":")
        numbers = fields[2:4] if path == PASSWD else fields[2:3]
        is_whole = len(fields) >= count and fields[0]
        if is_whole and all(map(_is_id, numbers)):
            yield [*fields[:2], *(str(int(one)) for one in numbers), *fields[2 + len(numbers) :]]


def _text(root: Path, path: str) -> str:
    """A plain file of the image; nothing where it is anything else."""
    tree = Tree(root)
    real = tree.real(path)
    if real is None or not _is_way_plain(tree, real):
        return ""
    try:
        # What is not a plain file would make us wait, and no link is followed on the host.
        handle = os.open(
            root / real.relative_to("/"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
                return ""
            return file.read(MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _is_way_plain(tree: Tree, real: PurePosixPath) -> bool:
    """Every folder above it is a real one."""
    return all(tree.look(folder) == "dir" for folder in real.parents)
