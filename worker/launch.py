"""Run the stages of one sandbox, and undo them: what every Celery task of a host is a thin skin on."""

import logging
import time
from contextlib import AbstractContextManager, suppress
from typing import Any

from worker import faults, limits, secrets
from worker.errors import ImageError, NotReady, SandbatchError
from worker.journal import Journal
from worker.log_lines import about
from worker.settings import Settings
from worker.spec import Spec
from worker.stages import STAGE, STAGES, Host, Stage

log = logging.getLogger("sandbatch")
TERMINAL = ("exited", "failed", "cancelled")
MOST_GONE = 3  # times that an image is fetched again because it was removed before it could be used


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
    _undo_stale(host, journal)
    if journal.is_done(name):
        return False
    if name in journal.begun:
        undo_stage(host, journal, stage)
    try:
        intent, refusal = stage.intend(host, journal), None
    except SandbatchError as error:
        intent, refusal = {}, error
    _begin(journal, name, intent)
    _do(host, journal, stage, refusal)
    return True


def about_journal(journal: Journal, stage: str | None = None) -> AbstractContextManager[None]:
    """Whom the lines of a block are about, and whose environment is not to be read in them."""
    whom = {"sandbox": journal.container_id, "batch": journal.batch or None, "attempt": journal.attempt}
    return about(**whom, stage=stage, env=journal.asked.env)


def _undo_stale(host: Host, journal: Journal) -> None:
    if journal.is_stale:
        for old in reversed(STAGES):
            undo_stage(host, journal, old)


def _begin(journal: Journal, name: str, intent: dict[str, Any]) -> None:
    try:
        journal.mark_begun(name, intent)  # before, not after: a failed ADD may already hold an address
    except OSError as error:
        words = f"its journal cannot be written: {error.strerror}"
        with suppress(OSError):  # there may be room for the shorter line
            journal.mark_failed(name, words)
        raise SandbatchError(journal.container_id, words, "make room on the host's disk") from error


def _do(host: Host, journal: Journal, stage: Stage, refusal: SandbatchError | None = None) -> None:
    name, began_s = stage.name, time.monotonic()
    with about_journal(journal, name):
        try:
            if refusal is not None:
                raise refusal
            faults.point(f"stage.{name}.do.before")
            data = stage.do(host, journal)
            faults.point(f"stage.{name}.do.after")
        except BaseException as error:  # a time limit of Celery too: the journal must say how it ended
            secrets.scrub(error, journal.asked.env)
            with suppress(OSError):  # a full disk must not hide why the stage failed
                journal.mark_failed(name, _words(error))
            raise
        journal.mark_done(name, data)
        log.info("done in %.3f s", time.monotonic() - began_s)


def begin_pull(host: Host, journal: Journal, digest: str | None, *, is_gone: bool = False) -> None:
    """Note that the sandbox waits for its image; no slot and no process is held for that.

    `digest`: the image that it is to have, where that is known. `is_gone`: it was here, and went before it
    could be used.

    Raises:
        ImageError: It went too often.
        SandbatchError: What the attempt before holds cannot be undone, or the journal not be written.
    """
    _undo_stale(host, journal)
    gone = int(journal.facts.get("gone") or 0) + 1 if is_gone else 0
    if gone >= MOST_GONE:
        words = f"was removed {gone} times between its pull and its use"
        raise ImageError(f"image {digest}", words, "see whoever removes images on this host")
    undo_stage(host, journal, STAGE["image"])
    _begin(journal, "image", {"reference": journal.asked.image, "digest": digest})
    journal.set_facts(pulling=True, fetched=None, gone=gone or None, image_digest=digest)


def end_pull(journal: Journal, outcome: str, detail: str, digest: str) -> bool:
    """Note how a pull ended; True if the image is here now, and the launch may go on once it has a slot.

    Raises:
        ImageError: It cannot be had.
    """
    if not journal.waits_for_image:
        return False
    if outcome != "fetched":
        journal.mark_failed("image", detail)
        journal.set_facts(pulling=None)
        raise ImageError(journal.container_id, detail)
    if not journal.facts.get("fetched") or journal.facts.get("image_digest") != digest:
        journal.set_facts(fetched=True, image_digest=digest)
    return True


def use_image(host: Host, journal: Journal, digest: str) -> None:
    """Do the stage `image` with what is here; one that was pulled has begun with its pull.

    Raises:
        ImageError: It is not here (any more), and `can_pass`; or it cannot be used as the spec asks.
    """
    has_waited = journal.waits_for_image and not journal.is_stale
    if journal.facts.get("pulling") or journal.facts.get("image_digest") != digest:
        journal.set_facts(pulling=None, fetched=None, image_digest=digest)
    if has_waited:
        _do(host, journal, STAGE["image"])
    else:
        run_stage(host, journal, "image")


def refuse_image(host: Host, journal: Journal, error: SandbatchError) -> None:
    """Note why the stage `image` fails before it does anything."""
    _undo_stale(host, journal)
    undo_stage(host, journal, STAGE["image"])
    _begin(journal, "image", {"reference": journal.asked.image, "digest": None})
    journal.mark_failed("image", str(error))


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
    with about_journal(journal, "ready"):
        log.info("is running: %s", detail)
    return True


def want_end(journal: Journal, final: str, error: dict[str, str] | None = None) -> None:
    """Turn the sandbox towards its end; the first reason given is kept."""
    if journal.is_unwinding:
        return
    facts: dict[str, object] = {"wanted": final}
    if error is not None:
        facts["error"] = error
    journal.set_facts(**facts)
    with about_journal(journal, "end"):
        log.info("turns to its end: %s", final)


def undo_stage(host: Host, journal: Journal, stage: Stage) -> None:
    """Undo one stage, if it was begun.

    Raises:
        SandbatchError: The undo failed; it stays due.
    """
    if stage.name not in journal.begun:
        return
    began_s = time.monotonic()
    with about_journal(journal, stage.name):
        journal.mark_undo_begun(stage.name)
        try:
            faults.point(f"stage.{stage.name}.undo.before")
            stage.undo(host, journal)
            faults.point(f"stage.{stage.name}.undo.after")
        except BaseException as error:
            secrets.scrub(error, journal.asked.env)
            with suppress(OSError):
                journal.mark_undo_failed(stage.name, _words(error))
            raise
        journal.mark_undone(stage.name)
        level = logging.DEBUG if stage.name == "ready" else logging.INFO  # which leaves nothing
        log.log(level, "undone in %.3f s", time.monotonic() - began_s)


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
        with about_journal(journal, "end"):
            log.info("is %s, nothing of it is left", journal.facts["final"])


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
