"""Publish again what was lost: a message popped and not yet booked, a wish that reached no worker.

Celery over Redis may lose a message (docs/celery.md). Everything published here is harmless to repeat.
"""

import json
import time
from pathlib import Path
from typing import Any

from celery import Celery

from tasks.app import LAUNCH_QUEUE, PRIORITY, host_queue
from tasks.record import Record, Wish
from tasks.state import State
from tasks.submit import publish_place, publish_stop, publish_unwind
from worker import journal
from worker.errors import JournalError

LOST_S = 10.0  # a message that was on its way so long ago is lost, if it is in no queue
SWEEP_S = 5.0  # between two sweeps of the fleet


def sweep_host(app: Celery, record: Record, host: str, sandboxes_dir: Path, *, is_first: bool) -> None:
    """Compare the record's wishes on this host with its journals.

    `is_first`: before this worker took any message, so that what has no journal is not on its way.
    """
    for wish in record.wishes_on(host):
        folder = sandboxes_dir / wish.container_id
        if not (folder / journal.FILE).exists():
            aside = journal.set_aside_files(folder)
            if aside or wish.state != State.PLACED:
                words = "the host has lost its journal"
                if aside:
                    words = f"journal unreadable: {aside[0].name}; sandbatch audit --mend undoes it"
                error = json.dumps({"stage": "place", "message": words})
                record.put(wish.container_id, State.FAILED, wish.attempt, {"error": error}, host=host)
            elif is_first or time.time() - wish.placed_at_s > LOST_S:
                publish_place(app, [(wish.container_id, wish.attempt, host)])
        elif wish.is_removed or wish.stop_grace_s is not None:
            _ask_again(app, host, folder, wish)


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
    elif wish.stop_grace_s is not None and not known.facts.get("stop"):
        publish_stop(app, known.container_id, known.attempt, host, wish.stop_grace_s)


def sweep_fleet(app: Celery, record: Record) -> None:
    """Publish `place` again for what is queued while its queue is empty; by one worker at a time."""
    if not record.may_sweep(SWEEP_S):
        return
    for container_id, attempt, deadline in record.overdue():
        message = f"its deadline, {deadline}, has passed before a host had room"
        error = json.dumps({"stage": "place", "message": message})
        fields = {"error": error, "reason": "deadline"}
        record.put(container_id, State.FAILED, attempt, fields, only_from=State.QUEUED)
    lost = record.long_queued(LOST_S)
    if not lost:
        return
    with app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        waiting = {host: _is_waiting(channel, host) for host in {host for _, _, host in lost}}
    again = [one for one in lost if not waiting[one[2]]]
    publish_place(app, again)
    record.sent_again([container_id for container_id, _, _ in again])


def _is_waiting(channel: Any, host: str | None) -> bool:
    """Whether messages of `place` wait in a queue."""
    queue = host_queue(host) if host else LAUNCH_QUEUE
    with channel.conn_or_acquire() as client:
        return bool(client.llen(channel._q_for_pri(queue, PRIORITY["place"])))
