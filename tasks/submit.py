"""What clients do: enqueue, remove. By task name, so that a laptop needs nothing of a host."""

import contextlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import KombuError

from tasks.app import options
from tasks.batch import NAME, BatchPlan
from tasks.connection import public_url
from tasks.messages import Order, PullOrder
from tasks.record import Record
from tasks.sealed import kind_of
from tasks.signing import Signer, signer
from tasks.state import TERMINAL, State
from worker.errors import BadInput, BrokerError
from worker.settings import Settings
from worker.spec import KINDS, Spec, new_container_id

BATCH_SIZE = 1000  # messages in one pipeline


def submit(
    app: Celery,
    record: Record,
    settings: Settings,
    specs: Sequence[Spec],
    batch: str | None = None,
    plan: BatchPlan | None = None,
) -> tuple[str, list[str]]:
    """Enqueue sandboxes; returns batch id and sandbox ids. Hosts take them as they have room.

    Raises:
        BadInput: `batch` is no name, or one that is there and would get another rule.
        BrokerError: The broker went away half-way; what was written is `queued` and is shown by `ls`.
    """
    if batch is not None and not NAME.fullmatch(batch):
        raise BadInput(
            f"batch name {batch!r}", "letters, digits, '_', '.', '-', at most 63", "choose another"
        )
    if batch is not None and plan is not None and record.batch(batch) is not None:
        raise BadInput(f"batch {batch}", "there is one already", "choose another name")
    batch = batch or "b-" + secrets.token_hex(6)
    ids, signed_by = [new_container_id() for _ in specs], signer(settings)
    ids_and_specs = list(zip(ids, specs, strict=True))
    try:
        record.enqueue(batch, ids_and_specs, plan, signed_by)
        _ask_elders(app, record, ids_and_specs[: (plan or BatchPlan()).first(len(ids))])
    except (redis.ConnectionError, redis.TimeoutError, KombuError) as error:
        raise BrokerError(
            f"broker {public_url(settings)}", str(error), f"batch {batch} may wait in part"
        ) from None
    return batch, ids


def _ask_elders(app: Celery, record: Record, specs: Sequence[tuple[str, Spec]]) -> None:
    """Where only hosts of release 0.1.0 live: ask them by messages, as a client of theirs does.

    Beside any other host they need none (`tasks.elder`).
    """
    hosts = record.live_hosts().values()
    if hosts and not any(facts.get("pulls") for facts in hosts):
        readable = [(container_id, 1, spec.host) for container_id, spec in specs if kind_of(spec) == KINDS[0]]
        record.note_for_elders([container_id for container_id, _, _ in readable])
        publish_place(app, readable)


def publish_place(app: Celery, wanted: Sequence[tuple[str, int, str | None]]) -> None:
    """Publish `place` for (id, attempt, the host that has taken it); harmless to repeat."""
    if not wanted:
        return
    with app.producer_pool.acquire(block=True) as acquired, contextlib.ExitStack() as batch:
        producer: Any = acquired  # the types know kombu 5.6, which has no batch()
        batch.enter_context(producer.batch(BATCH_SIZE))
        for container_id, attempt, host in wanted:
            app.send_task(
                "sandbatch.place",
                kwargs={"message": Order(container_id=container_id, attempt=attempt).model_dump()},
                task_id=f"{container_id}.{attempt}.place",
                argsrepr=f"place · {container_id} · {host or 'any host'}",
                kwargsrepr="{}",
                producer=producer,
                **options("place", host),
            )


def cancel(app: Celery, record: Record, batch: str) -> None:
    """Drop what waits of a batch, undo what hosts have of it; records and logs stay. Harmless to repeat."""
    record.stop_batch(batch)
    live = [one for one in record.get_all(record.batch_ids(batch)) if one["state"] not in TERMINAL]
    left = record.cancel_all([one["id"] for one in live])
    for one in record.get_all(left):
        if one["state"] not in TERMINAL:
            publish_unwind(app, one["id"], one["attempt"], one["host"], State.CANCELLED)


def remove(app: Celery, record: Record, sandboxes: Sequence[dict[str, Any]]) -> None:
    """Ask for the end of sandboxes; their hosts undo them. Those that nobody has taken are cancelled at once.

    First the wish, in the record: a host that has just taken one sees it before it begins.
    """
    record.mark_removed([sandbox["id"] for sandbox in sandboxes])
    for sandbox in sandboxes:
        if sandbox["state"] not in TERMINAL and record.cancel(sandbox["id"], sandbox["attempt"]):
            continue
        now = record.get(sandbox["id"]) or sandbox
        if now["state"] not in TERMINAL or _has_log(now):
            publish_unwind(app, now["id"], now["attempt"], now["host"], State.EXITED, forget=True)


def stop(
    app: Celery, record: Record, sandboxes: Sequence[dict[str, Any]], grace_s: float | None = None
) -> None:
    """Ask sandboxes to end; after the grace, by default that of each, their hosts end them."""
    live = {one["id"]: one for one in sandboxes if one["state"] not in TERMINAL}
    graces = {name: one["spec"].get("stop_grace_s", 10.0) for name, one in live.items()}
    if grace_s is not None:
        graces = dict.fromkeys(graces, grace_s)
    record.mark_stopped(graces)
    for name, one in live.items():
        if not record.cancel(name, one["attempt"]):
            now = record.get(name) or one
            if now["state"] not in TERMINAL:
                publish_stop(app, name, now["attempt"], now["host"], graces[name])


def order_pull(
    app: Celery,
    record: Record,
    hosts: Sequence[str],
    reference: str,
    policy: str = "always",
    signer: Signer | None = None,
) -> dict[str, str]:
    """Have hosts pull an image; the id of each host's order. `Record.follow_orders` shows how they go on.

    The wish lies in the record until it is carried out, also over a restart of the host's worker; a host
    that is away does it when it is back, within a day.

    Args:
        hosts: Names, of hosts that know images: `facts["kinds"]` of `live_hosts` has "spec/v3".
        reference: Canonical (`worker.image_ref`).
        policy: "always": ask the registry what the reference is now; "missing": what the host has will do.
    Raises:
        BrokerError: It went away half-way; orders that were written are carried out.
    """
    try:
        orders = {host: record.write_order(host, reference, policy, signer) for host in hosts}
        for host, pull_id in orders.items():
            app.send_task(
                "sandbatch.pull",
                kwargs={"message": PullOrder(pull_id=pull_id).model_dump()},
                argsrepr=f"pull · {reference} · {host}",
                kwargsrepr="{}",
                **options("pull", host),
            )
    except (redis.ConnectionError, redis.TimeoutError, KombuError) as error:
        todo = "what was ordered is pulled; run it again when the broker is back"
        raise BrokerError("broker", str(error), todo) from None
    return orders


def _has_log(sandbox: dict[str, Any]) -> bool:
    """Its host still keeps what it wrote."""
    until = sandbox["log_until"]
    return bool(until and sandbox["host"]) and datetime.fromisoformat(until) > datetime.now(UTC)


def publish_unwind(
    app: Celery,
    container_id: str,
    attempt: int,
    host: str,
    final: str,
    *,
    forget: bool = False,
    reason: str = "",
) -> None:
    """Publish the undo of whatever the sandbox holds on `host`; harmless to repeat."""
    more = {"reason": reason} if reason else {}  # a host of release 0.1.0 knows no such argument
    _publish(app, "unwind", container_id, attempt, host, final=final, forget=forget, **more)


def publish_stop(app: Celery, container_id: str, attempt: int, host: str, grace_s: float) -> None:
    """Publish the wish that a sandbox stops; harmless to repeat."""
    _publish(app, "stop", container_id, attempt, host, reason="stop", grace_s=grace_s)


def _publish(app: Celery, step: str, container_id: str, attempt: int, host: str, **more: Any) -> None:
    app.send_task(
        f"sandbatch.{step}",
        kwargs={"message": Order(container_id=container_id, attempt=attempt).model_dump(), **more},
        argsrepr=f"{step} · {container_id} · {host}",
        kwargsrepr="{}",
        **options(step, host),
    )
