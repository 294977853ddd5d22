"""conmon's log files: `TIME stream F|P text`, one line a record, bytes as the sandbox wrote them.

F ends a line of the sandbox, P is a part of one that goes on in the stream's next record.
"""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from worker.errors import BadInput

READ_BYTES = 1 << 16  # a record of conmon's is at most 8 KiB of text
MOST_TIME = 64  # bytes of a time stamp
TIME = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.+Z-]{1,48}")
CURSOR = re.compile(r"^(?P<inode>[0-9]+) (?P<first>\S*) (?P<offset>[0-9]{1,18}) (?P<mid>[01]{2})$", re.ASCII)


@dataclass(frozen=True)
class Record:
    """One record; `end` is the offset behind it in its file."""

    time: bytes
    stream: str
    is_partial: bool
    text: bytes
    end: int

    @property
    def at(self) -> float:
        """Seconds since the epoch."""
        return datetime.fromisoformat(self.time.decode()).timestamp()


def parse(line: bytes, end: int = 0) -> Record | None:
    """One line without its newline; None for one that was torn, by a full disk or a kill of conmon."""
    parts = line.split(b" ", 3)
    if len(parts) != 4 or parts[1] not in (b"stdout", b"stderr") or parts[2] not in (b"F", b"P"):
        return None
    if not TIME.fullmatch(parts[0]):
        return None
    return Record(parts[0], parts[1].decode(), parts[2] == b"P", parts[3], end)


class LogFile:
    """An open log. It stays readable after conmon has put a new file in its place."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.offset = 0

    def close(self) -> None:
        os.close(self._fd)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def is_at(self, path: Path) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(path))
        except FileNotFoundError:
            return False

    @property
    def identity(self) -> str:
        """Tells this file from another one that has got the same inode number."""
        first = os.pread(self._fd, MOST_TIME, 0).split(b" ", 1)
        is_time = len(first) > 1 and TIME.fullmatch(first[0])
        return f"{os.fstat(self._fd).st_ino} {first[0].decode() if is_time else ''}"

    def records(self, until: int | None = None) -> Iterator[Record]:
        """The records from `offset` on, up to the offset `until` or the last whole line.

        `offset` moves behind each that is taken.
        """
        while until is None or self.offset < until:
            raw = os.pread(self._fd, READ_BYTES, self.offset)
            lines = raw.split(b"\n")
            if lines.pop() and not lines and len(raw) == READ_BYTES:
                self.offset += len(raw)  # no record is so long: it is not conmon's
                continue
            if not lines:
                return
            for line in lines:
                self.offset += len(line) + 1
                record = parse(line, self.offset)
                if record is not None:
                    yield record

    def rest(self) -> Record | None:
        """A last line without its newline: nobody will finish it once conmon has ended."""
        raw = os.pread(self._fd, READ_BYTES, self.offset)
        return parse(raw, self.offset + len(raw)) if raw and b"\n" not in raw else None


def start_of(log: LogFile, *, since: float | None, tail: int | None, streams: Iterable[str]) -> int:
    """The offset from which a log is to be shown: no record before `since`, the last `tail` lines."""
    wanted = set(streams)
    start, before, mid = 0, 0, dict.fromkeys(("stdout", "stderr"), False)
    lines: deque[int] = deque(maxlen=tail)
    for record in log.records(log.size):
        if since is not None and _is_before(record, since):
            start = record.end
        elif record.stream in wanted:
            if tail is not None and not mid[record.stream]:
                lines.append(before)
            mid[record.stream] = record.is_partial
        before = record.end
    end = log.offset
    log.offset = 0
    if tail is None:
        return start
    return lines[0] if lines else end


def _is_before(record: Record, since: float) -> bool:
    """No for a record whose time is none: what may be wanted is shown."""
    try:
        return record.at < since
    except (ValueError, OverflowError):
        return False


@dataclass
class Shower:
    """Makes of records what is shown; remembers which stream is in the midst of a line."""

    streams: tuple[str, ...]
    timestamps: bool = False
    mid: dict[str, bool] = field(default_factory=lambda: {"stdout": False, "stderr": False})

    def show(self, record: Record) -> bytes:
        """What a client gets of a record; empty for a stream that is not asked for."""
        if record.stream not in self.streams:
            return b""
        head = record.time + b" " if self.timestamps and not self.mid[record.stream] else b""
        self.mid[record.stream] = record.is_partial
        return head + record.text + (b"" if record.is_partial else b"\n")


def cursor_of(log: LogFile, offset: int, shower: Shower) -> str:
    """Where a client that has all up to here would go on."""
    return f"{log.identity} {offset} {shower.mid['stdout']:d}{shower.mid['stderr']:d}"


def read_cursor(cursor: str) -> tuple[str, int, dict[str, bool]]:
    """Identity of the file, offset, and the streams that are in the midst of a line.

    Raises:
        BadInput: It is none.
    """
    match = CURSOR.fullmatch(cursor)
    if match is None:
        raise BadInput("logs", f"cursor {cursor!r} is none", "ask without it")
    mid = {"stdout": match["mid"][0] == "1", "stderr": match["mid"][1] == "1"}
    return f"{match['inode']} {match['first']}", int(match["offset"]), mid
