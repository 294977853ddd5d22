"""Publish again what was lost: a message popped and not yet booked, a wish that reached no worker.

Celery over Redis may lose a message (docs/celery.md). Everything published here is harmless to repeat.
"""

import json
import time
from pathlib import Path

from celery import Celery

from tasks.elder import hand_out
from tasks.lost import sweep_lost
from tasks.record import Record, Wish
from tasks.state import State
from tasks.submit import cancel, publish_place, publish_stop, publish_unwind
from worker import journal
from worker.errors import JournalError

LOST_S = 10.0  # a message that was on its way so long ago is lost, if it is in no queue
SWEEP_S = 5.0  # between two sweeps of the fleet
OPEN_S = 120.0  # no client takes so long to write a batch


def sweep_host(app: Celery, record: Record, host: str, sandboxes_dir: Path, *, is_first: bool) -> None:
    """Compare the record's wishes on this host with its journals.

    `is_first`: before this worker took any message, so that what has no journal is not on its way.
    """
    here = {path.parent.name for path in sandboxes_dir.glob(f"sb-*/{journal.FILE}")}
    for wish in record.wishes_on(host):
        here.discard(wish.container_id)
        folder = sandboxes_dir / wish.container_id
        if not (folder / journal.FILE).exists():
            aside = journal.set_aside_files(folder)
            if aside or wish.state != State.PLACED:
                words = "the host has lost its journal"
                if aside:
                    words = f"journal unreadable: {aside[0].name}; sandbatch audit --mend undoes it"
                error = json.dumps({"stage": "place", "message": words})
                record.put(wish.container_id, State.FAILED, wish.attempt, {"error": error})
            elif wish.is_replaced:
                record.put(wish.container_id, State.CANCELLED, wish.attempt, {"reason": "rescheduled"})
            elif is_first or time.time() - wish.placed_at_s > LOST_S:
                publish_place(app, [(wish.container_id, wish.attempt, host)])
        elif wish.is_removed or wish.is_cancelled or wish.is_replaced or wish.stop_grace_s is not None:
            _ask_again(app, host, folder, wish)
    for container_id in record.ended(sorted(here)):
        _undo_what_is_over(app, host, sandboxes_dir / container_id)


def _ask_again(app: Celery, host: str, folder: Path, wish: Wish) -> None:
    """The message of an `rm` or a `stop` that no worker has heard."""
    try:
        known = journal.read(folder)
    except JournalError:
        return  # it has just ended; or cannot be read, which audit shows
    if known.is_unwinding:
        return
    if wish.is_removed:
        publish_unwind(app, known.container_id, known.attempt, host, State.EXITED, forget=True)
    elif wish.is_replaced:
        publish_unwind(app, known.container_id, known.attempt, host, State.CANCELLED, reason="rescheduled")
    elif wish.is_cancelled:
        publish_unwind(app, known.container_id, known.attempt, host, State.CANCELLED)
    elif wish.stop_grace_s is not None and not known.facts.get("stop"):
        publish_stop(app, known.container_id, known.attempt, host, wish.stop_grace_s)


def _undo_what_is_over(app: Celery, host: str, folder: Path) -> None:
    """What somebody has ended in the record while this host was lost, and forgotten."""
    try:
        known = journal.read(folder)
    except JournalError:
        return  # as above
    if not known.final and not known.is_unwinding:
        publish_unwind(app, known.container_id, known.attempt, host, State.CANCELLED, reason="lost")


def sweep_fleet(app: Celery, record: Record) -> None:
    """What no host has, and batches: by one worker at a time."""
    if not record.may_sweep(SWEEP_S):
        return
    for container_id, attempt, deadline in record.overdue():
        message = f"its deadline, {deadline}, has passed before a host had room"
        error = json.dumps({"stage": "place", "message": message})
        fields = {"error": error, "reason": "deadline"}
        record.put(container_id, State.FAILED, attempt, fields, only_from=State.QUEUED)
    record.offer_again(LOST_S)
    sweep_lost(record)
    hand_out(app, record)
    for batch in record.open_batches(OPEN_S):
        record.close_batch(batch)
    for batch in record.broken_batches():
        cancel(app, record, batch)
