"""The Celery tasks of a host: one a stage, one an undo, each a thin skin on `worker.launch`.

place ─▶ image ─▶ netns ─▶ network ─▶ egress ─▶ bundle ─▶ container ┄ keeper ┄▶ ready ┄ keeper ┄▶ ended
       │   └┄ fetcher ┄▶ fetched ┄ puller ┄▶ image: an image that is not here holds no slot
       │            restart: the same again, after the undos ◀────────────────┤
       └─ any failure: unwind ─▶ undo.container ─▶ undo.bundle ─▶ undo.egress ─▶ undo.network ─▶ undo.netns
"""

import json
import logging
import random
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import redis
from celery import Celery, Task, chain
from celery.canvas import Signature
from celery.exceptions import Ignore, Reject
from kombu.exceptions import KombuError

from tasks import claims
from tasks.app import make_app, options, settings
from tasks.connection import connect
from tasks.messages import Order, read_order
from tasks.record import Record
from tasks.scripts import BROKEN
from tasks.signing import Refused
from tasks.state import State
from tasks.submit import cancel
from worker import conmon, ends, fetcher, log_lines, logs, outcomes, procs
from worker import journal as journals
from worker.errors import BadInput, Busy, JournalError, SandbatchError
from worker.journal import Journal
from worker.keeper import hand_over
from worker.launch import (
    about_journal,
    begin_waiting,
    end_waiting,
    finish,
    run_stage,
    undo_stage,
    want_end,
    with_host_limits,
)
from worker.probe_runsc import probe
from worker.spec import Spec
from worker.stages import STAGE, STAGES, Host, make_host, stages_of

log = logging.getLogger("sandbatch")

MAX_TRIES, MAX_TRYING_S = 5, 60.0  # of one stage or undo whose error can pass
BUSY_WAIT_S = 2.0  # a twin of a message ends within the time of one stage
MAX_BUSY_TRIES = 60
TASK_STAGES = tuple(stage.name for stage in STAGES if stage.name != "ready")  # a probe is no task
LAST = "container"  # after it the keeper waits

app: Celery = make_app(settings(), settings().host)


@lru_cache(maxsize=1)
def this_host() -> Host:
    """What the stages need, made once a process; the probe of runsc is remembered on disk."""
    return make_host(settings(), hides_sysctl=probe(settings()).hides_sysctl)


@lru_cache(maxsize=1)
def record() -> Record:
    return Record(connect(settings(), patient=True))


# -- signatures ----------------------------------------------------------------------------------


def step(name: str, order: Order, **more: Any) -> Signature[Any]:
    """An immutable signature of one step on this host, with the words that Flower shows."""
    host = settings().host
    return app.signature(
        f"sandbatch.{name}",
        kwargs={"message": order.model_dump(), **more},
        immutable=True,
        argsrepr=f"{name} · {order.container_id} · {host}",
        kwargsrepr="{}",
        **options(name, host),
    )


def launch_chain(order: Order, spec: Spec, *, is_admitted: bool = False) -> Signature[Any]:
    """The stages of the spec, first to last; whichever fails, the errback unwinds.

    `is_admitted`: it has waited for its image, and has a launch slot now.

    The errback is bound: only so does Celery publish it, to the host's queue, instead of running
    it where the failure was noticed (celery/backends/base.py, _call_task_errbacks).
    """
    more = {"image": {"is_admitted": True}} if is_admitted else {}
    names = [one.name for one in stages_of(spec) if one.name in TASK_STAGES]
    stages = chain(*(step(name, order, **more.get(name, {})) for name in names))
    return stages.on_error(step("unwind", order, final="failed"))


def undo_chain(order: Order, begun: list[str]) -> Signature[Any]:
    """The undos of what was begun, in reverse; a chain stops at the first that fails, as it must."""
    return chain(*(step(f"undo.{name}", order) for name in reversed(TASK_STAGES) if name in begun))


# -- tasks ---------------------------------------------------------------------------------------


@app.task(name="sandbatch.place", bind=True, max_retries=None)
def place(self: "Task[Any, Any]", message: dict[str, Any]) -> dict[str, str]:
    """Begin the journal of a sandbox that this host has taken, publish its stages; returns the host."""
    order, host, began_s = read_order(message), settings().host, time.monotonic()
    try:
        known, where = record().spec(order.container_id), record().placement(order.container_id)
        if known and where and where[0] == State.QUEUED:  # a client of release 0.1.0 asks by message
            record().offer({order.container_id: known[0]})
        if known is None or where != (State.PLACED, host, order.attempt):
            raise Ignore  # another host's, or a twin of this message after it moved on
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Reject(error, requeue=True) from error
    try:
        spec, signed = claims.spec_of(settings(), record(), order.container_id, known)
        if spec.deadline_at is not None and datetime.fromisoformat(spec.deadline_at) <= datetime.now(UTC):
            why = f"its deadline, {spec.deadline_at}, has passed before a host had room"
            _refuse(order, why, "deadline")
            raise SandbatchError(order.container_id, why)
        spec = with_host_limits(spec, settings())
        sandboxes = settings().sandboxes_dir
        log_lines.also_about(env=spec.env)
        name, attempt, batch = order.container_id, order.attempt, known[1]
        journals.create(sandboxes, name, attempt=attempt, batch=batch, spec=spec, signed=signed)
    except (ValueError, BadInput, Refused) as error:
        _refuse(order, f"the host refuses the spec: {claims.why(error)}")
        raise
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Reject(error, requeue=True) from error
    except OSError as error:  # a full disk: what cannot be journaled is not begun
        _refuse(order, f"its journal cannot be written: {error.strerror}")
        raise
    except JournalError:
        raise Ignore from None  # set aside: the sweep tells the record
    except Busy as error:
        raise again(self, order, error) from error
    try:
        with journals.locked(sandboxes, order.container_id, wait_s=BUSY_WAIT_S) as journal:
            # An `rm` between take and journal found nothing to undo here: only this look sees it.
            if not record().is_wanted(order.container_id):
                want_end(journal, State.CANCELLED)
                _finish_if_empty(journal)
            elif journal.attempt == order.attempt and not journal.begun and not journal.is_unwinding:
                _launch(journal)
                result = "failed" if journal.is_unwinding else "done"
                outcomes.tell_place(result, time.monotonic() - began_s)
                if spec.deadline_at is not None:
                    hand_over(settings(), order.container_id)
    except JournalError:
        raise Ignore from None  # ended and forgotten since
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Reject(error, requeue=True) from error
    if journal.final:
        _tell_end(journal)
    return {"host": host}


def relaunch(known: Journal) -> None:
    """Publish the stages of a sandbox again, or for the first time if a worker was lost just before that."""
    try:
        claims.claim(settings(), record().client, known)
        launch_chain(_order_of(known), known.spec).apply_async()
    except Refused as error:
        with journals.locked(settings().sandboxes_dir, known.container_id, wait_s=BUSY_WAIT_S) as journal:
            _end_refused(journal, error)
        if journal.final:
            _tell_end(journal)


def _launch(journal: Journal) -> None:
    """Publish its stages, once it is sure that no other host launches the same signed spec."""
    try:
        claims.claim(settings(), record().client, journal)
    except Refused as error:
        _end_refused(journal, error)
    else:
        launch_chain(_order_of(journal), journal.spec).apply_async()
        with about_journal(journal, "place"):
            log.info("is begun here")


def _end_refused(journal: Journal, error: Refused) -> None:
    if not journal.is_unwinding:
        journal.set_facts(reason="refused")
        words = f"the host refuses the spec: {claims.why(error)}"
        want_end(journal, State.FAILED, {"stage": "place", "message": words})
        with about_journal(journal, "place"):
            log.error("%s", words)
    _begin_undo(journal)


def _order_of(journal: Journal) -> Order:
    return Order(container_id=journal.container_id, attempt=journal.attempt)


def _refuse(order: Order, message: str, reason: str = "refused") -> None:
    """End a sandbox at `place`: nothing of it has been begun."""
    fields = {"error": json.dumps({"stage": "place", "message": message[:400]}), "reason": reason}
    record().put(order.container_id, State.FAILED, order.attempt, fields)
    outcomes.tell_place("failed", 0.0)
    outcomes.tell_end(State.FAILED, reason)


def _stage_task(name: str) -> None:
    @app.task(name=f"sandbatch.{name}", bind=True, max_retries=None)
    def do_stage(self: "Task[Any, Any]", message: dict[str, Any]) -> None:
        order = read_order(message)
        try:
            with journal_of(order) as journal:
                if not run_stage(this_host(), journal, name):
                    skip(journal, name)
                elif name == LAST:
                    begin_waiting(journal)
        except SandbatchError as error:
            raise again(self, order, error) from error
        report(journal)
        if name == LAST:
            hand_over(settings(), order.container_id)

    do_stage.__doc__ = f"Do stage {name}: see worker.stages."


def _undo_task(name: str) -> None:
    @app.task(name=f"sandbatch.undo.{name}", bind=True, max_retries=None)
    def undo(self: "Task[Any, Any]", message: dict[str, Any]) -> None:
        order = read_order(message)
        try:
            with journal_of(order) as journal:
                if not journal.is_unwinding:
                    raise Ignore  # of an attempt to end it that never was: undo needs the intent
                undo_stage(this_host(), journal, STAGE[name])
                _finish_if_empty(journal)
        except SandbatchError as error:
            try:
                raise again(self, order, error) from error
            except SandbatchError:
                _mark_stuck(order, name, error)
                raise
        _tell_end(journal)
        if name == "image":
            fetcher.hand_over(settings(), order.container_id)  # it waits no more

    undo.__doc__ = f"Undo stage {name}: see worker.stages."


for _name in TASK_STAGES:
    if _name != "image":  # of which the task is in tasks.image_steps
        _stage_task(_name)
    _undo_task(_name)


@app.task(name="sandbatch.ready", bind=True, max_retries=None)
def ready(self: "Task[Any, Any]", message: dict[str, Any], outcome: str, detail: str) -> None:
    """Note what the keeper saw: the sandbox is running, or failed."""
    order = read_order(message)
    try:
        with journal_of(order) as journal:
            if end_waiting(journal, outcome, detail) and "running_at" not in journal.facts:
                journal.set_facts(running_at=journals.now())
    except Busy as error:
        raise again(self, order, error) from error
    report(journal)
    if journal.spec.ttl_s is not None:
        hand_over(settings(), order.container_id)


@app.task(name="sandbatch.ended", bind=True, max_retries=None)
def ended(self: "Task[Any, Any]", message: dict[str, Any]) -> None:
    """Note that the program has ended: the restart policy follows, or the undos."""
    order = read_order(message)
    try:
        with journal_of(order) as journal:
            if not ends.note_end(settings(), journal, is_alive=_is_alive(order.container_id)):
                raise Ignore  # a twin of this message has noted it
            if journal.is_unwinding:
                _begin_undo(journal)
    except Busy as error:
        raise again(self, order, error) from error
    _tell_end(journal)
    if not journal.is_unwinding:
        hand_over(settings(), order.container_id)  # the keeper has the clock of its next start


@app.task(name="sandbatch.restart", bind=True, max_retries=None)
def restart(self: "Task[Any, Any]", message: dict[str, Any]) -> None:
    """Begin a sandbox anew: the first stage undoes what its last run holds, the network gets a new ADD."""
    order = read_order(message)
    try:
        with journal_of(order) as journal:
            if journal.is_unwinding or not journal.facts.get("restart_at"):
                raise Ignore
            order = Order(container_id=order.container_id, attempt=journal.attempt + 1)
            journal.new_attempt(order.attempt)
            journal.set_facts(restart_at=None)
            launch_chain(order, journal.spec).apply_async()
    except Busy as error:
        raise again(self, order, error) from error
    report(journal)


@app.task(name="sandbatch.stop", bind=True, max_retries=None)
def stop(self: "Task[Any, Any]", message: dict[str, Any], reason: str, grace_s: float | None = None) -> None:
    """Ask a sandbox to end: the keeper has the clock. One that runs nothing is undone."""
    order = read_order(message)
    try:
        with journals.locked(settings().sandboxes_dir, order.container_id, wait_s=BUSY_WAIT_S) as journal:
            if journal.is_unwinding:
                raise Ignore
            if journal.is_up:
                ends.ask_to_stop(journal, reason, journal.spec.stop_grace_s if grace_s is None else grace_s)
            else:
                ends.end_unstarted(journal, reason)
                _begin_undo(journal)
    except JournalError:
        _end_without_journal(order, State.CANCELLED)
        raise Ignore from None
    except Busy as error:
        raise again(self, order, error) from error
    _tell_end(journal)
    hand_over(settings(), order.container_id)


@app.task(name="sandbatch.unwind", bind=True, max_retries=None)
def unwind(
    self: "Task[Any, Any]",
    message: dict[str, Any],
    final: str,
    forget: bool = False,
    reason: str = "cancel",
) -> None:
    """Turn a sandbox towards its end and publish the undos; the errback of a launch, and `rm`.

    `forget`: its log as well. `reason`: of one that is cancelled.
    """
    order = read_order(message)
    try:
        with journals.locked(settings().sandboxes_dir, order.container_id, wait_s=BUSY_WAIT_S) as journal:
            if journal.attempt != order.attempt and final == State.FAILED:
                raise Ignore  # a failure of an attempt that is over
            if forget and not journal.facts.get("forget"):
                journal.set_facts(forget=True, **({} if journal.is_unwinding else {"reason": "rm"}))
            if final == State.CANCELLED and not journal.is_unwinding:
                journal.set_facts(reason=reason)
            want_end(journal, final, _first_error(journal) if final == State.FAILED else None)
            _begin_undo(journal)
    except JournalError:
        if forget:
            logs.drop(settings(), order.container_id)
        _end_without_journal(order, final)
        raise Ignore from None
    except Busy as error:
        raise again(self, order, error) from error
    _tell_end(journal)


# -- what the tasks share --------------------------------------------------------------------------


def journal_of(order: Order) -> Any:
    """The journal under its lock; `Ignore` for an attempt that is over or a sandbox that has ended."""
    return _Fenced(order)


class _Fenced:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._manager = journals.locked(settings().sandboxes_dir, order.container_id, wait_s=BUSY_WAIT_S)

    def __enter__(self) -> Journal:
        try:
            journal = self._manager.__enter__()
        except JournalError as error:
            if (settings().sandboxes_dir / self._order.container_id).exists():
                raise  # it is there and cannot be read: that is a failure, not an end
            raise Ignore from error
        if journal.attempt != self._order.attempt or journal.final:
            self._manager.__exit__(None, None, None)
            raise Ignore
        log_lines.also_about(batch=journal.batch or None, env=journal.asked.env)
        return journal

    def __exit__(self, *details: Any) -> None:
        self._manager.__exit__(*details)


def _begin_undo(journal: Journal) -> None:
    """Publish the undos of what the journal has as begun; finish it where there is nothing."""
    if "ready" in journal.begun:
        undo_stage(this_host(), journal, STAGE["ready"])
    if journal.begun:
        order = Order(container_id=journal.container_id, attempt=journal.attempt)
        undo_chain(order, journal.begun).apply_async()
    else:
        _finish_if_empty(journal)


def _is_alive(container_id: str) -> bool:
    """Whether its processes are there; asked only where conmon has written no exit code."""
    if conmon.exit_code(settings().exit_dir, container_id) is not None:
        return False
    return bool(procs.whole(procs.processes_of(settings().runsc_root, container_id)))


def skip(journal: Journal, name: str) -> None:
    """A stage that had nothing to do: go on with the chain only if the next stage has not begun."""
    names = [stage.name for stage in stages_of(journal.spec)]
    following = names[names.index(name) + 1]
    if journal.is_unwinding or following in journal.begun:
        raise Ignore


def again(task: "Task[Any, Any]", order: Order, error: SandbatchError) -> BaseException:
    """Retry with backoff and jitter where the error can pass, within both limits; else the error itself."""
    tries = task.request.retries or 0
    first_at = float((task.request.headers or {}).get("first_at") or time.time())
    limit = MAX_BUSY_TRIES if isinstance(error, Busy) else MAX_TRIES
    if (
        not error.can_pass
        or tries >= limit
        or time.time() - first_at > MAX_TRYING_S * (1 + limit // MAX_TRIES)
    ):
        return error
    delay_s = min(0.2 * 2**tries, 5.0) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, no secret
    level = logging.DEBUG if isinstance(error, Busy) else logging.WARNING  # a twin's work is none of ours
    log.log(level, "is tried again in %.1f s, %d of %d: %s", delay_s, tries + 1, limit, error)
    return task.retry(countdown=delay_s, exc=error, throw=False, headers={"first_at": str(first_at)})


def _first_error(journal: Journal) -> dict[str, str]:
    """The stage that failed, in the words of its journal; a lost process leaves a stage without an end."""
    for run in journal.runs:
        if run.verb == "do" and run.state == "failed" and run.error:
            last = [r for r in journal.runs if r.verb == "do" and r.state == "failed"][-1]
            return {"stage": last.name, "message": str(last.error)}
    begun = [run for run in journal.runs if run.verb == "do" and run.state == "begun"]
    stage = begun[-1].name if begun else "place"
    return {"stage": stage, "message": "the process that did it was lost"}


def _finish_if_empty(journal: Journal) -> None:
    if not journal.begun and journal.final is None:
        finish(journal)
        facts: dict[str, Any] = {"ended_at": journal.facts.get("ended_at", journals.now())}
        until = None if journal.facts.get("forget") else logs.kept_until(settings(), journal.spec)
        if until is not None and journal.log_path.exists():
            facts["log_until"] = datetime.fromtimestamp(until, UTC).isoformat().replace("+00:00", "Z")
        journal.set_facts(**facts)


def _mark_stuck(order: Order, stage: str, error: SandbatchError) -> None:
    with journals.locked(settings().sandboxes_dir, order.container_id, wait_s=BUSY_WAIT_S) as journal:
        facts: dict[str, Any] = {"stuck": {"stage": stage, "message": str(error)}}
        journal.set_facts(**facts)
    report(journal)


def _tell_end(journal: Journal) -> None:
    """Report; and once the record knows the end, forget the journal."""
    if report(journal) and journal.final:
        forget(journal)


def forget(journal: Journal) -> None:
    """Keep the log, drop the journal. It waits for a holder, which may be a twin that only looks."""
    sandboxes, container_id = settings().sandboxes_dir, journal.container_id
    try:
        with journals.locked(sandboxes, container_id, wait_s=BUSY_WAIT_S) as current:
            if current.final:
                claims.end(settings(), record().client, current)
                if not current.facts.get("forget"):
                    logs.keep(settings(), current)
                current.remove()
    except (Busy, JournalError, redis.RedisError):
        return  # another task has just done it, or does it now; if it dies over it, reconcile does it


def report(journal: Journal) -> bool:
    """Bring the record up to the journal; False if the broker is away: reconcile reports later."""
    try:
        if record().report(journal, settings().host) == BROKEN:
            cancel(app, record(), journal.batch)
    except (redis.RedisError, KombuError, OSError) as error:
        with about_journal(journal):
            log.warning("its report waits: %s", error)
        return False
    return True


def _end_without_journal(order: Order, final: str) -> None:
    """A sandbox that this host never began (or has forgotten) ends in the record alone."""
    if (settings().sandboxes_dir / order.container_id).exists():
        return  # a journal that cannot be read: audit shows it, nothing is claimed about it
    record().put(order.container_id, State(final), order.attempt, {})
