"""Run the stages of one sandbox, and undo them: what every Celery task of a host is a thin skin on."""

from contextlib import suppress

from worker import faults, limits
from worker.errors import NotReady, SandbatchError
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import Spec
from worker.stages import STAGE, STAGES, Host, Stage

TERMINAL = ("exited", "failed", "cancelled")


def with_host_limits(spec: Spec, settings: Settings) -> Spec:
    """The spec with this host's limits where it names none: what the journal has, and `show`.

    Raises:
        BadInput: Nothing can start with these limits, or this host cannot enforce them.
    """
    spec = limits.with_defaults(
        spec, memory_bytes=settings.default_memory, cpus=settings.default_cpus, pids=settings.default_pids
    )
    limits.check(spec)
    limits.check_here(spec)
    return spec


def run_stage(host: Host, journal: Journal, name: str) -> bool:
    """Do one stage; True if it was done now, False if there was nothing (more) to do.

    A new attempt begins with the undo of what the one before it left: half of a stage is unknown, and
    a sandbox that ran has taken the addresses off its netns. A stage that failed and is tried again
    is undone first.

    Raises:
        SandbatchError: The stage failed, and says so in the journal. Its undo is still due.
    """
    stage = STAGE[name]
    if journal.is_unwinding:
        return False
    if journal.is_stale:
        for old in reversed(STAGES):
            undo_stage(host, journal, old)
    if journal.is_done(name):
        return False
    if name in journal.begun:
        undo_stage(host, journal, stage)
    try:
        intent, refusal = stage.intend(host, journal), None
    except SandbatchError as error:
        intent, refusal = {}, error
    try:
        journal.mark_begun(name, intent)  # before, not after: a failed ADD may already hold an address
    except OSError as error:
        words = f"its journal cannot be written: {error.strerror}"
        with suppress(OSError):  # there may be room for the shorter line
            journal.mark_failed(name, words)
        raise SandbatchError(journal.container_id, words, "make room on the host's disk") from error
    try:
        if refusal is not None:
            raise refusal
        faults.point(f"stage.{name}.do.before")
        data = stage.do(host, journal)
        faults.point(f"stage.{name}.do.after")
    except BaseException as error:  # a time limit of Celery too: the journal must say how it ended
        with suppress(OSError):  # a full disk must not hide why the stage failed
            journal.mark_failed(name, _words(error))
        raise
    journal.mark_done(name, data)
    return True


def begin_waiting(journal: Journal) -> None:
    """Note that the sandbox is now to answer its probe; nobody holds a launch slot for that."""
    if "ready" not in journal.begun:
        journal.mark_begun("ready")


def end_waiting(journal: Journal, outcome: str, detail: str) -> bool:
    """Note what the prober saw; True if the sandbox is running now.

    Raises:
        NotReady: No answer before the deadline, or the sandbox ended first.
    """
    if journal.is_unwinding or journal.is_done("ready"):
        return False
    if outcome != "answered":
        journal.mark_failed("ready", detail)
        raise NotReady(journal.container_id, detail, "see its log, or give a longer --ready-timeout")
    journal.mark_done("ready", {"probe": detail})
    return True


def want_end(journal: Journal, final: str, error: dict[str, str] | None = None) -> None:
    """Turn the sandbox towards its end; the first reason given is kept."""
    if journal.is_unwinding:
        return
    facts: dict[str, object] = {"wanted": final}
    if error is not None:
        facts["error"] = error
    journal.set_facts(**facts)


def undo_stage(host: Host, journal: Journal, stage: Stage) -> None:
    """Undo one stage, if it was begun.

    Raises:
        SandbatchError: The undo failed; it stays due.
    """
    if stage.name not in journal.begun:
        return
    journal.mark_undo_begun(stage.name)
    try:
        faults.point(f"stage.{stage.name}.undo.before")
        stage.undo(host, journal)
        faults.point(f"stage.{stage.name}.undo.after")
    except BaseException as error:
        with suppress(OSError):
            journal.mark_undo_failed(stage.name, _words(error))
        raise
    journal.mark_undone(stage.name)


def undo_all(host: Host, journal: Journal) -> None:
    """Undo what was begun, last stage first; stop at the first failure, as a DEL retried needs its netns."""
    for stage in reversed(STAGES):
        undo_stage(host, journal, stage)
    finish(journal)


def finish(journal: Journal) -> None:
    """Note the terminal state, once nothing is begun any more."""
    if journal.begun:
        raise SandbatchError(
            journal.container_id, f"still holds {', '.join(journal.begun)}", "undo these first"
        )
    if journal.final is None:
        journal.set_facts(final=journal.facts.get("wanted", "failed"), stuck=None)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
