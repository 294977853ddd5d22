"""Batches in the record: their counters are changed by the scripts that move sandboxes."""

import time
from collections.abc import Sequence
from typing import Any, cast

import redis

from tasks import batch
from tasks.keys import BATCHES, BROKEN_BATCHES, EVENTS_KEPT, OPEN, TERMINAL_KEPT_S, batch_key
from tasks.scripts import BROKEN, CLOSE
from worker.journal import now


class Batches:
    """The batches, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._close = client.register_script(CLOSE)

    def close_batch(self, batch: str) -> bool:
        """Note that all of a batch is written; False if its rule is broken already."""
        args: list[str | float] = [batch, now(), time.time(), TERMINAL_KEPT_S, EVENTS_KEPT]
        return int(self._close(keys=[], args=args)) != BROKEN

    def batch(self, name: str) -> dict[str, Any] | None:
        """One batch: its counters, its rule, its outcome; None if there is none (any more)."""
        found = self._batches([name])
        return found[0] if found else None

    def batches(self) -> list[dict[str, Any]]:
        """All batches, oldest first; the index forgets those that have expired."""
        names = cast("list[str]", self.client.zrange(BATCHES, 0, -1))
        found = self._batches(names)
        gone = set(names) - {one["name"] for one in found}
        if gone:
            self.client.zrem(BATCHES, *gone)
        return found

    def _batches(self, names: Sequence[str]) -> list[dict[str, Any]]:
        pipe = self.client.pipeline(transaction=False)
        for name in names:
            pipe.hgetall(batch_key(name))
            pipe.llen(batch_key(name) + ":held")
        answers = pipe.execute()
        rows = zip(names, answers[::2], answers[1::2], strict=True)
        return [batch.shape(name, raw, held) for name, raw, held in rows if raw]

    def batch_ids(self, name: str) -> list[str]:
        """The ids of a batch, in their order."""
        return cast("list[str]", self.client.lrange(batch_key(name) + ":ids", 0, -1))

    def stop_batch(self, name: str) -> None:
        """Let no more of a batch go."""
        self.client.hset(batch_key(name), "cancelled", "1")
        self.client.srem(BROKEN_BATCHES, name)

    def broken_batches(self) -> list[str]:
        """Batches that are to be cancelled by their own rule."""
        return sorted(cast("set[str]", self.client.smembers(BROKEN_BATCHES)))

    def open_batches(self, age_s: float) -> list[str]:
        """Batches whose submission began so long ago and has not come to its end: its client has died."""
        return cast("list[str]", self.client.zrangebyscore(OPEN, "-inf", time.time() - age_s))
