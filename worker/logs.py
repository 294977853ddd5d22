"""Where a sandbox's log is: beside its journal while that lives, then kept for a while on its own.

The name of a kept log has the moment at which it may go, so that nothing else need be remembered:
`logs/ID.EPOCH_S.log` below `state_dir`.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.journal import Journal
from worker.settings import Settings
from worker.spec import Spec

KEPT = re.compile(r"^(?P<id>sb-[0-9a-f]{16})\.(?P<until>[0-9]{1,12})\.log$")
LIVE = "container.log"
# A log that nobody asked to keep stays so long all the same: `run --attach --rm` still reads its end.
FAREWELL_S = 30.0


@dataclass(frozen=True)
class Kept:
    """The log of a sandbox that has ended; it may go `until` seconds after the epoch."""

    path: Path
    container_id: str
    until: int


def keep(settings: Settings, journal: Journal) -> Path | None:
    """Move an ended sandbox's log to where it is kept; None where there is none, or none is to be kept.

    Before the journal is removed. Safe to repeat.
    """
    until = kept_until(settings, journal.spec)
    if until is None:
        return None
    folder = settings.logs_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = folder / f"{journal.container_id}.{until}.log"
    try:
        journal.log_path.rename(place)
    except FileNotFoundError:
        return None  # it never had one, or it is kept already
    return place


def kept_until(settings: Settings, spec: Spec) -> int | None:
    """Until when, in seconds since the epoch, the log of one that ends now is kept; None: not at all."""
    keep_s = settings.log_keep_s if spec.keep_s is None else spec.keep_s
    if spec.remove:
        keep_s = FAREWELL_S
    return int(time.time() + keep_s) + 1 if keep_s > 0 else None


def find(settings: Settings, container_id: str) -> Path | None:
    """The log of a sandbox, live or kept; None where there is none (any more)."""
    live = settings.sandboxes_dir / container_id / LIVE
    if live.exists():
        return live
    kept = [one for one in kept_logs(settings) if one.container_id == container_id]
    return max(kept, key=lambda one: one.until).path if kept else None


def drop(settings: Settings, container_id: str) -> None:
    """Remove what is kept of a sandbox. Safe to repeat."""
    for one in kept_logs(settings):
        if one.container_id == container_id:
            one.path.unlink(missing_ok=True)


def prune(settings: Settings, now: float) -> list[Path]:
    """Remove the kept logs whose time is up at `now`, and, oldest first, those beyond `logs_max_bytes`."""
    removed, room = [], settings.logs_max_bytes
    for one in sorted(kept_logs(settings), key=lambda one: one.until, reverse=True):
        try:
            size = one.path.stat().st_size
            if one.until > now and size <= room:
                room -= size
                continue
            one.path.unlink()
            removed.append(one.path)
        except FileNotFoundError:
            continue  # dropped just now
    return removed


def kept_logs(settings: Settings) -> Iterator[Kept]:
    """Every kept log, whether its time is up or not."""
    try:
        names = os.listdir(settings.logs_dir)
    except FileNotFoundError:
        return
    for name in names:
        match = KEPT.fullmatch(name)
        if match:
            yield Kept(settings.logs_dir / name, match["id"], int(match["until"]))
