"""What a worker finds when it starts, and every some seconds after: the journals decide what is due."""

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from worker import ends, journal
from worker.errors import Busy, JournalError
from worker.journal import FILE, Journal, boot_id
from worker.launch import want_end
from worker.procs import all_sandbox_processes, whole
from worker.settings import Settings

log = logging.getLogger("sandbatch")
QUIET_S = 10.0  # an undo that wrote nothing for so long has lost its messages, or failed
SETTLED_S = 2.0  # what was written so long ago should have been reported by whoever wrote it
LONGEST_BACKOFF_S = 600.0
MAX_ATTEMPTS = 5  # a sandbox whose launch has taken so many workers with it is given up
TWIN_WAIT_S = 2.0  # a child of the dead worker dies with it: it holds a lock no longer than this


@dataclass
class Due:
    """What is to be done, as journals: the tasks layer turns it into messages."""

    relaunch: list[Journal] = field(default_factory=list)  # begin anew, with the attempt of the journal
    unwind: list[Journal] = field(default_factory=list)  # go on with the undo
    wait: list[Journal] = field(default_factory=list)  # began to run, and has not answered yet
    watch: list[Journal] = field(default_factory=list)  # hand over to the keeper: it has the clock
    ended: list[Journal] = field(default_factory=list)  # its program has ended, and nobody has noted it
    restart: list[Journal] = field(default_factory=list)  # its next start is overdue
    fetch: list[Journal] = field(default_factory=list)  # hand over to the fetcher: waits for its image
    admit: list[Journal] = field(default_factory=list)  # its image is here: it goes on once it has a slot
    report: list[Journal] = field(default_factory=list)  # tell the record


def at_start(settings: Settings) -> Due:
    """Look at every journal before this worker takes messages: none of them is being worked on.

    A launch under way gets a new attempt number, so that the messages of the dead worker act on
    nothing, and begins anew.
    """
    due, boot = Due(), boot_id()
    alive = whole(all_sandbox_processes(settings.runsc_root))
    journals, errors = journal.read_all(settings.sandboxes_dir)
    for unreadable in errors:
        _set_aside(settings, unreadable)
    for found in journals:
        try:
            with journal.locked(settings.sandboxes_dir, found.container_id, wait_s=TWIN_WAIT_S) as known:
                _sort(due, known, settings, boot, alive)
        except (Busy, JournalError):
            continue  # somebody still works on it, or it has just ended: a later look decides
    return due


def _set_aside(settings: Settings, error: JournalError) -> None:
    """A journal that cannot be read gets a name that says so; nothing is claimed about its sandbox.

    An empty folder is what a worker leaves that was killed while it forgot an ended sandbox (seen in a
    storm: between the journal's removal and the folder's).
    """
    if not error.kind:
        with suppress(Busy, OSError), journal.held(settings.sandboxes_dir, Path(error.what).name) as folder:
            folder.rmdir()
    else:
        try:
            name = Path(error.what).parent.name
            with journal.held(settings.sandboxes_dir, name, wait_s=TWIN_WAIT_S) as folder:
                journal.set_aside(folder)
        except (Busy, OSError) as why:
            log.warning("%s; it cannot be set aside: %s", error, why)


def _sort(due: Due, known: Journal, settings: Settings, boot: str, alive: set[str]) -> None:
    if known.final:
        due.report.append(known)
        return
    if not known.is_unwinding and known.boot != boot:
        want_end(known, "failed", {"stage": _stage(known), "message": "host rebooted"})
    if known.is_up:
        ends.note_end(settings, known, is_alive=known.container_id in alive)
    if known.is_unwinding:
        due.unwind.append(known)
    elif known.facts.get("restart_at") or (known.is_up and known.is_done("ready")):
        due.watch.append(known)
        due.report.append(known)
    elif known.is_up:
        due.wait.append(known)
    else:
        _next_attempt(due, known)


def _next_attempt(due: Due, known: Journal) -> None:
    lost = known.attempt - known.facts.get("restarts", 0)  # a restart is an attempt as well, and no loss
    if lost < MAX_ATTEMPTS:
        known.new_attempt(known.attempt + 1)
        # The fetcher first, also if its image is here by now: only so it waits for a slot.
        (due.fetch if known.waits_for_image else due.relaunch).append(known)
        return
    words = f"given up: {lost} attempts ended with the loss of the process that made them"
    want_end(known, "failed", {"stage": _stage(known), "message": words})
    due.unwind.append(known)


class Later:
    """The looks while the worker works: undo that stands still, waiting that nobody does, unsent reports.

    A journal is read again only if it was written since, so that a host with a thousand quiet
    sandboxes pays for a thousand `stat`s, not reads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._written: dict[str, int] = {}  # id -> mtime_ns of its journal at the last look
        self._settled: dict[str, int] = {}  # id -> the same, of a view with which nothing is due
        self._up: dict[str, Journal] = {}  # whose program was running at the last look

    def look(self) -> Due:
        due, folder = Due(), self._settings.sandboxes_dir
        self._written = {}
        for path in sorted(folder.glob(f"sb-*/{FILE}")):
            try:
                written_ns = path.stat().st_mtime_ns
                self._written[path.parent.name] = written_ns
                quiet_s = time.time() - written_ns / 1e9
                if quiet_s > SETTLED_S and self._settled.get(path.parent.name) != written_ns:
                    self._sort(due, journal.read(path.parent), quiet_s)
            except (FileNotFoundError, JournalError):
                continue  # it has just ended; or cannot be read, which audit shows
        self._settled = {name: at for name, at in self._settled.items() if name in self._written}
        self._up = {name: known for name, known in self._up.items() if name in self._written}
        self._find_ended(due)
        return due

    def _find_ended(self, due: Due) -> None:
        """Ends that no event has told: the message was lost, or the sandbox was killed with its conmon."""
        if not self._up:
            return
        exits, alive = self._settings.exit_dir, whole(all_sandbox_processes(self._settings.runsc_root))
        written = set(os.listdir(exits)) if exits.is_dir() else set()
        for name, known in self._up.items():
            if name in written or name not in alive:
                due.ended.append(known)

    @property
    def up(self) -> list[Journal]:
        """The sandboxes that were up at the last look."""
        return list(self._up.values())

    def settle(self, container_id: str) -> None:
        """The report of the last look has arrived: leave the journal alone until it is written again."""
        if container_id in self._written:
            self._settled[container_id] = self._written[container_id]

    def forget_reports(self) -> None:
        """Report every sandbox again: the broker may have lost what it knew."""
        self._settled.clear()

    def _sort(self, due: Due, known: Journal, quiet_s: float) -> None:
        self._up.pop(known.container_id, None)
        if known.is_up:
            self._up[known.container_id] = known
        failures = sum(run.verb == "undo" and run.state == "failed" for run in known.runs)
        if known.final:
            due.report.append(known)
        elif known.is_unwinding:
            if quiet_s > min(QUIET_S * 2 ** min(failures, 8), LONGEST_BACKOFF_S):
                due.unwind.append(known)
        elif known.facts.get("restart_at"):
            due.report.append(known)
            overdue_s = time.time() - journal.seconds(known.facts["restart_at"])
            (due.restart if overdue_s > QUIET_S else due.watch).append(known)
            self._written.pop(known.container_id)  # never settled: its time comes without an event
        elif known.is_up and known.is_done("ready"):
            due.report.append(known)
            due.watch.append(known)
        elif known.is_up:
            due.wait.append(known)
            self._written.pop(known.container_id)  # never settled: the keeper's message may be lost
        elif known.waits_for_image:  # however long its pull takes
            (due.admit if known.facts.get("fetched") else due.fetch).append(known)
            self._written.pop(known.container_id)  # never settled: as above
        elif quiet_s > self._settings.stall_s:
            self._fence(due, known.container_id)

    def _fence(self, due: Due, container_id: str) -> None:
        try:
            with journal.locked(self._settings.sandboxes_dir, container_id) as known:
                if not known.is_unwinding and not known.is_up and not known.facts.get("restart_at"):
                    _next_attempt(due, known)
        except (Busy, JournalError):
            return  # somebody works on it after all


def _stage(known: Journal) -> str:
    return known.begun[-1] if known.begun else "place"
