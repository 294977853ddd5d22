"""The gate before the shared queue: a host that has no room leaves new work to others. A consumer bootstep.

It closes and opens this worker's own consumer, in its event loop; the host's own queue flows on.
"""

import logging
import os
from typing import Any

from celery import bootsteps

from tasks.app import LAUNCH_QUEUE, settings
from worker.settings import Settings

log = logging.getLogger("sandbatch")
LOOK_S = 0.5  # a look costs 0.1 ms
MIN_FREE_BYTES, MIN_FREE_FILES = 64 << 20, 1000


def no_room(current: Settings) -> str:
    """Why this host takes no new sandboxes at the moment; empty while it does."""
    found = os.statvfs(current.state_dir)
    lacks = ""
    if found.f_bavail * found.f_frsize < MIN_FREE_BYTES:
        lacks = f"{MIN_FREE_BYTES >> 20} MiB"
    elif found.f_files and found.f_favail < MIN_FREE_FILES:
        lacks = f"{MIN_FREE_FILES} inodes"
    if lacks:
        return f"{current.state_dir} has less than {lacks} left: a launch could not be journaled"
    if current.sandboxes_dir.is_dir() and len(os.listdir(current.sandboxes_dir)) >= current.capacity:
        return f"full: {current.capacity} sandboxes"
    return ""


class Gate(bootsteps.StartStopStep):
    """Opens and closes the shared queue by what `no_room` says."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._timer: Any = None

    def start(self, parent: Any) -> None:
        self._timer = parent.timer.call_repeatedly(LOOK_S, self._look, (parent,))
        self._look(parent)

    def stop(self, parent: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, consumer: Any) -> None:
        reason, is_open = no_room(settings()), consumer.task_consumer.consuming_from(LAUNCH_QUEUE)
        if is_open and reason:
            log.warning("takes no new sandboxes: %s", reason)
            consumer.cancel_task_queue(LAUNCH_QUEUE)
        elif not is_open and not reason:
            log.info("takes new sandboxes again")
            consumer.add_task_queue(LAUNCH_QUEUE)
