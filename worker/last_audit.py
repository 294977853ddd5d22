"""What the last `sandbatch audit` of this host found, for who looks later: `/metrics` has it."""

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from worker.settings import Settings

log = logging.getLogger("sandbatch")
FILE = "last-audit.json"
VERSION = "last-audit/v1"


@dataclass(frozen=True)
class LastAudit:
    """`kinds`: how many objects of each kind should not be there, are missing or changed."""

    at_s: float
    kinds: dict[str, int]

    @property
    def found(self) -> int:
        return sum(self.kinds.values())


def note(settings: Settings, kinds: Iterable[str]) -> None:
    """Note that an audit has just found objects of these kinds, each named once for each object.

    What cannot be written is logged: the audit's own answer is what counts.
    """
    said = {"kind": VERSION, "at": round(time.time(), 3), "kinds": Counter(kinds)}
    file = settings.state_dir / FILE
    writing = file.with_name(f".{FILE}.{secrets.token_hex(4)}")
    try:
        writing.write_text(json.dumps(said))
        writing.replace(file)
    except OSError as error:
        writing.unlink(missing_ok=True)
        if settings.state_dir.is_dir():  # else there has never been a worker, and nobody who would read it
            log.warning("%s cannot be written, /metrics has the audit before: %s", file, error)


def last(settings: Settings) -> LastAudit | None:
    """None if there was none, or its note cannot be read, which is logged."""
    file: Path = settings.state_dir / FILE
    try:
        said = json.loads(file.read_bytes())
        return LastAudit(float(said["at"]), {str(kind): int(count) for kind, count in said["kinds"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not to be read: %s", file, error)
        return None
