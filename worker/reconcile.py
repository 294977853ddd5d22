"""What a worker finds when it starts, and every some seconds after: the journals decide what is due."""

import time
from dataclasses import dataclass

from worker import conmon, journal
from worker.errors import Busy, JournalError
from worker.journal import FILE, Journal, boot_id
from worker.launch import want_end
from worker.procs import all_sandbox_processes
from worker.settings import Settings

LAUNCH_QUIET_S = 180.0  # longer than any stage may take: its message is lost
QUIET_S = 10.0  # an undo that wrote nothing for so long has lost its messages, or failed
LONGEST_BACKOFF_S = 600.0


@dataclass
class Due:
    """What is to be done, as ids: the tasks layer turns it into messages."""

    relaunch: list[Journal]  # go on with the stages that are not done
    unwind: list[Journal]  # go on with the undo
    wait: list[Journal]  # hand over to the prober
    report: list[Journal]  # tell the record


def at_start(settings: Settings) -> Due:
    """Look at every journal before this worker takes messages: none of them is being worked on.

    A launch under way gets a new attempt number, so that the messages of the dead worker act on
    nothing; it goes on from its first stage that is not done.
    """
    due = Due([], [], [], [])
    boot = boot_id()
    alive = {
        proc.container_id for proc in all_sandbox_processes(settings.runsc_root) if proc.role == "sandbox"
    }
    for found in journal.read_all(settings.sandboxes_dir)[0]:
        try:
            with journal.locked(settings.sandboxes_dir, found.container_id, wait_s=2.0) as known:
                _sort(due, known, settings, boot, alive)
        except (Busy, JournalError):
            continue  # a child of the dead worker ends it just now: the next look sees it
    return due


def _sort(due: Due, known: Journal, settings: Settings, boot: str, alive: set[str]) -> None:
    if known.final:
        due.report.append(known)
        return
    if not known.is_unwinding and known.boot != boot:
        want_end(known, "failed", {"stage": _stage(known), "message": "host rebooted"})
    if not known.is_unwinding and known.is_done("container"):
        code = conmon.exit_code(settings.exit_dir, known.container_id)
        if code is not None or known.container_id not in alive:
            _note_end(known, code)
    if known.is_unwinding:
        due.unwind.append(known)
    elif known.is_done("ready"):
        due.report.append(known)
    elif known.is_done("container"):
        due.wait.append(known)
    else:
        known.new_attempt(known.attempt + 1)
        due.relaunch.append(known)


def _note_end(known: Journal, code: int | None) -> None:
    words = f"ended with exit code {code}" if code is not None else "was killed from outside"
    if known.is_done("ready"):
        error = None if code is not None else {"stage": "container", "message": f"the sandbox {words}"}
        want_end(known, "exited" if code is not None else "failed", error)
    else:
        want_end(
            known, "failed", {"stage": "ready", "message": f"the sandbox {words} while the worker was away"}
        )


def later(settings: Settings) -> Due:
    """Look again while the worker works: undo that stands still, waiting that nobody does, unsent reports."""
    due = Due([], [], [], [])
    for known in journal.read_all(settings.sandboxes_dir)[0]:
        try:
            quiet_s = time.time() - (known.folder / FILE).stat().st_mtime
        except FileNotFoundError:
            continue  # it has just ended
        failures = sum(run.verb == "undo" and run.state == "failed" for run in known.runs)
        if known.final:
            due.report.append(known)
        elif known.is_unwinding and quiet_s > min(QUIET_S * 2 ** min(failures, 8), LONGEST_BACKOFF_S):
            due.unwind.append(known)
        elif "ready" in known.begun and not known.is_done("ready") and not known.is_unwinding:
            due.wait.append(known)
        elif not known.is_done("container") and not known.is_unwinding and quiet_s > LAUNCH_QUIET_S:
            _fence(due, settings, known.container_id)
        elif quiet_s < 60 and known.is_done("ready"):
            due.report.append(known)
    return due


def _fence(due: Due, settings: Settings, container_id: str) -> None:
    try:
        with journal.locked(settings.sandboxes_dir, container_id) as known:
            if not known.is_unwinding and not known.is_done("container"):
                known.new_attempt(known.attempt + 1)
                due.relaunch.append(known)
    except (Busy, JournalError):
        return  # somebody works on it after all


def _stage(known: Journal) -> str:
    return known.begun[-1] if known.begun else "place"
