"""What clients do: enqueue, remove. By task name, so that a laptop needs nothing of a host."""

import contextlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError

from tasks.app import options
from tasks.connection import public_url
from tasks.messages import Order
from tasks.record import Record
from tasks.state import TERMINAL, State
from worker.errors import BadInput, BrokerError
from worker.settings import Settings
from worker.spec import Spec, new_container_id

BATCH_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,62}$")
BATCH_SIZE = 1000  # messages in one pipeline


def submit(
    app: Celery, record: Record, settings: Settings, specs: Sequence[Spec], batch: str | None = None
) -> tuple[str, list[str]]:
    """Enqueue sandboxes: the records first, then the messages; returns batch id and sandbox ids.

    Raises:
        BadInput: `batch` is no name.
        BrokerError: The broker went away half-way; what was written is `queued` and is shown by `ls`.
    """
    if batch is not None and not BATCH_NAME.fullmatch(batch):
        raise BadInput(
            f"batch name {batch!r}", "letters, digits, '_', '.', '-', at most 63", "choose another"
        )
    batch = batch or "b-" + secrets.token_hex(6)
    ids = [new_container_id() for _ in specs]
    record.enqueue(batch, list(zip(ids, specs, strict=True)))
    try:
        publish_place(
            app, [(container_id, 1, spec.host) for container_id, spec in zip(ids, specs, strict=True)]
        )
    except (KombuError, OSError) as error:
        raise BrokerError(
            f"broker {public_url(settings)}", str(error), f"batch {batch} may wait in part"
        ) from None
    return batch, ids


def publish_place(app: Celery, wanted: Sequence[tuple[str, int, str | None]]) -> None:
    """Publish `place` for (id, attempt, host); harmless to repeat."""
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


def remove(app: Celery, record: Record, sandboxes: Sequence[dict[str, Any]]) -> None:
    """Ask for the end of sandboxes; their hosts undo them. Those that nobody has taken are cancelled at once.

    First the wish, in the record: a host that has just claimed one sees it before it begins.
    """
    record.mark_removed([sandbox["id"] for sandbox in sandboxes])
    for sandbox in sandboxes:
        if sandbox["state"] in TERMINAL or record.cancel(sandbox["id"], sandbox["attempt"]):
            continue
        now = record.get(sandbox["id"]) or sandbox
        if now["state"] not in TERMINAL:
            publish_unwind(app, now["id"], now["attempt"], now["host"], State.EXITED)


def publish_unwind(app: Celery, container_id: str, attempt: int, host: str, final: str) -> None:
    """Publish the undo of whatever the sandbox holds on `host`; harmless to repeat."""
    app.send_task(
        "sandbatch.unwind",
        kwargs={"message": Order(container_id=container_id, attempt=attempt).model_dump(), "final": final},
        argsrepr=f"unwind · {container_id} · {host}",
        kwargsrepr="{}",
        **options("unwind", host),
    )
