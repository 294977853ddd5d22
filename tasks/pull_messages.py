"""What a host's fetcher tells: to the record, and as tasks on its queue (`worker.fetcher.Tell`)."""

import contextlib
import logging
from typing import Any

import redis

from tasks import signing, workflow
from tasks.messages import Order
from tasks.record import Record
from worker import fetcher
from worker.settings import Settings

log = logging.getLogger("sandbatch")
SHOWN = ("digest", "phase", "done_bytes", "total_bytes", "tries", "words")  # of a pull, in an order for it


class PullMessages:
    """Behind one connection, which its threads share."""

    def __init__(self, settings: Settings, record: Record) -> None:
        self._host, self._record, self._trust = settings.host, record, signing.trust(settings)

    def pinned(self, batch: str, reference: str) -> str | None:
        return self._record.pinned(batch, reference)

    def pin(self, batch: str, reference: str, digest: str) -> str:
        return self._record.pin(batch, reference, digest)

    def fetched(self, container_id: str, attempt: int, outcome: str, detail: str, digest: str) -> None:
        order = Order(container_id=container_id, attempt=attempt)
        signature = workflow.step("fetched", order, outcome=outcome, detail=detail, digest=digest)
        # With the errback of a launch: a sandbox whose image cannot be had has failed.
        signature.on_error(workflow.step("unwind", order, final="failed")).apply_async()

    def order(self, name: str) -> fetcher.Order | None:
        row = self._record.order(name)
        if row is None or row["ended_at"] is not None or row["host"] != self._host:
            return None
        if self._trust is not None:
            try:
                self._record.check_order(row, self._trust)
            except signing.Refused as error:
                log.error("order %s is refused: %s; %s", name, error.why, error.todo)
                self._record.tell_order(name, state="failed", error=str(error), phase="")
                return None
        return fetcher.Order(row["reference"], row["policy"])

    def carried_out(self, name: str, outcome: str, detail: str, digest: str) -> None:
        if outcome == "fetched":
            self._record.tell_order(name, state="done", digest=digest, phase="")
        else:
            self._record.tell_order(name, state="failed", error=detail, phase="")

    def progress(self, rows: list[dict[str, Any]]) -> None:
        self._record.show_pulls(self._host, rows)
        for row in rows:
            for name in row["orders"]:
                self._record.tell_order(name, state="pulling", **{one: row[one] for one in SHOWN})

    def forget(self) -> None:
        """The worker stops: nothing is pulled any more. Without a broker it expires by itself."""
        with contextlib.suppress(redis.RedisError, OSError):
            self._record.show_pulls(self._host, [])
