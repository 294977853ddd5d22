"""Placement by pull: a host takes from what waits as much as it has room for, and no more.

A thread of the worker's main process. It asks the broker by one script (`tasks.scripts.TAKE`), which knows
what the host has in all; what it gets it publishes as `place` on its own queue. With nothing to take, or no
room, it sleeps on two bells: one that rings for everybody when something is enqueued, and the host's own,
which rings when a launch is through, a sandbox has ended, or somebody resumes the host.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import KombuError

from tasks.record import Record
from tasks.submit import publish_place
from worker.settings import Settings

log = logging.getLogger("sandbatch")
LOOK_S = 5.0  # for what rings no bell: room on the disk, an address that came free
RETRY_S = 1.0  # a broker that is away
MIN_FREE_BYTES, MIN_FREE_FILES = 64 << 20, 1000


def no_room(current: Settings) -> str:
    """Why this host takes no new sandboxes at the moment; empty while it does. For people."""
    if lacks := no_disk(current):
        return lacks
    if current.sandboxes_dir.is_dir() and len(os.listdir(current.sandboxes_dir)) >= current.capacity:
        return f"full: {current.capacity} sandboxes"
    return ""


def no_disk(current: Settings) -> str:
    """Why this host could not journal a launch; empty if it can."""
    found = os.statvfs(current.state_dir)
    lacks = ""
    if found.f_bavail * found.f_frsize < MIN_FREE_BYTES:
        lacks = f"{MIN_FREE_BYTES >> 20} MiB"
    elif found.f_files and found.f_favail < MIN_FREE_FILES:
        lacks = f"{MIN_FREE_FILES} inodes"
    if lacks:
        return f"{current.state_dir} has less than {lacks} left: a launch could not be journaled"
    return ""


class Puller:
    """Takes work for one host until it is stopped.

    `go_on` publishes launches, (id, attempt), that have waited here for an image and have a slot now.
    """

    def __init__(
        self,
        app: Celery,
        record: Record,
        settings: Settings,
        offer: Callable[[], dict[str, Any]],
        go_on: Callable[[str, int], None],
    ) -> None:
        self._app = app
        self._record = record
        self._settings = settings
        self._offer = offer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="puller", daemon=True)
        self._said = ""
        self._go_on = go_on
        self._taken: list[tuple[str, int]] = []  # and not yet published
        self._admitted: list[tuple[str, int]] = []  # as well

    def start(self) -> None:
        """Begin to take; once only."""
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """Take no more; what is taken already is launched."""
        self._stop.set()
        if self._thread.is_alive():
            try:
                self._record.ring(self._settings.host)
            except redis.RedisError:
                log.info("the puller ends by itself within %g s: no broker to wake it", LOOK_S)
            self._thread.join(timeout=LOOK_S)

    def _run(self) -> None:
        marks: dict[str, str] = {}
        while not self._stop.is_set():
            try:
                # The marks are older than the look: what rings in between is heard.
                marks = marks or self._record.bells(self._settings.host)
                if not self._take():
                    marks = self._record.wait_for_bell(marks, LOOK_S)
            except (redis.RedisError, KombuError, OSError) as error:
                log.warning("host %s takes no work: %s", self._settings.host, error)
                marks = {}
                self._stop.wait(RETRY_S)
            except Exception:  # a defect in one look must not leave a host without work for ever
                log.exception("host %s: its look for work failed", self._settings.host)
                self._stop.wait(LOOK_S)

    def _take(self) -> bool:
        """Take what there is room for; False if that was nothing."""
        # Not by the count of folders: those of sandboxes that have just ended are still there when their
        # ends ring the bell, and script TAKE counts.
        reason = no_disk(self._settings)
        if reason != self._said:
            log.log(
                logging.WARNING if reason else logging.INFO,
                f"takes no new sandboxes: {reason}" if reason else "takes new sandboxes again",
            )
            self._said = reason
        if reason:
            return False
        host = self._settings.host
        if not self._taken and not self._admitted:  # else the broker went away before they were published
            self._taken, self._admitted = self._record.take_and_admit(host, self._offer())
        count = len(self._taken) + len(self._admitted)
        while self._admitted:
            self._go_on(*self._admitted[0])
            del self._admitted[0]
        # Should this not be heard: the sweep of this host publishes again what has no journal.
        publish_place(self._app, [(container_id, attempt, host) for container_id, attempt in self._taken])
        self._taken = []
        return count > 0
