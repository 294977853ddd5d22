"""What waits: the lines from which hosts take as much as they have room for.

A line is a sorted set of ids that need the same: which host, or which labels of a host, which networks, how
much memory. A host judges a line by its head, so that ten thousand that do not fit cost it nothing.

The queue is a part of the record, not of Celery: a list of messages hands its head to whoever comes, and
knows nothing of memory, labels, addresses or batches.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import redis

from tasks.batch import BatchPlan
from tasks.batches import Batches
from tasks.keys import (
    BATCHES,
    BELL,
    BELLS_KEPT,
    CHUNK,
    DEADLINES,
    EVENTS_KEPT,
    LINES,
    OPEN,
    QUEUED,
    SANDBOXES,
    batch_key,
    line_key,
    sandbox_key,
)
from tasks.scripts import OFFER, TAKE
from tasks.state import State
from worker.journal import now, seconds
from worker.spec import Spec

KINDS = ("spec/v1",)  # of specs that this release can launch
COMMAND_KEPT = 80  # characters, for tables


class Lines(Batches):
    """The lines, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        super().__init__(client)
        self._take = client.register_script(TAKE)
        self._offer = client.register_script(OFFER)

    def enqueue(
        self, batch: str, ids_and_specs: Sequence[tuple[str, Spec]], plan: BatchPlan | None = None
    ) -> None:
        """Write a batch and records of new ids as `queued`, and offer them to the hosts.

        Raises:
            BadInput: The plan asks for more successes than there are sandboxes.
        """
        plan = plan or BatchPlan()
        at, score, total = now(), time.time(), len(ids_and_specs)
        first = plan.first(total)
        key, fields = batch_key(batch), plan.fields(total)
        pipe = self.client.pipeline()
        pipe.hsetnx(key, "created_at", at)
        pipe.hdel(key, "outcome", "ended_at")  # one that is there grows
        pipe.hset(key, mapping=dict[Any, Any]({"open": 1, **fields}))
        for what in ("", ":ids", ":held"):
            pipe.persist(key + what)
        pipe.zadd(BATCHES, {batch: score}, nx=True)
        pipe.zadd(OPEN, {batch: score})
        pipe.execute()
        for start in range(0, total, CHUNK):
            part = ids_and_specs[start : start + CHUNK]
            free = part[: max(0, first - start)]
            pipe = self.client.pipeline()
            for container_id, spec in part:
                raw: dict[Any, Any] = {
                    "id": container_id,
                    "batch": batch,
                    "attempt": 1,
                    "state": str(State.QUEUED),
                    "created_at": at,
                    "spec": spec.model_dump_json(),
                    **needs_of(spec),
                }
                pipe.hset(sandbox_key(container_id), mapping=raw)
            pipe.zadd(SANDBOXES, {one: score + offset * 1e-6 for offset, (one, _) in enumerate(part, start)})
            pipe.rpush(key + ":ids", *(one for one, _ in part))
            pipe.hincrby(key, "total", len(part))
            deadlines = {one: seconds(spec.deadline_at) for one, spec in part if spec.deadline_at is not None}
            if deadlines:
                pipe.zadd(DEADLINES, deadlines)
            if len(free) < len(part):
                held = [one for one, _ in part[len(free) :]]
                for container_id in held:
                    pipe.hset(sandbox_key(container_id), "held", 1)
                pipe.rpush(key + ":held", *held)
            self._line_up(pipe, free, score, start)
            pipe.hincrby(key, "released", len(free))
            pipe.execute()
        self.close_batch(batch)

    def _line_up(self, pipe: Any, part: Sequence[tuple[str, Spec]], score: float, number: int) -> None:
        """Put sandboxes in their lines, in this order, as script OFFER does one by one."""
        lines: dict[str, dict[str, float]] = {}
        for offset, (container_id, spec) in enumerate(part, number):
            lines.setdefault(line_of(spec), {})[container_id] = score + offset * 1e-6
        for name, line in lines.items():
            pipe.zadd(line_key(name), line)
            pipe.zadd(QUEUED, line)
            pipe.sadd(LINES, name)
        pipe.xadd(BELL, {"look": "1"}, maxlen=BELLS_KEPT)

    def offer(self, specs: Mapping[str, Spec]) -> None:
        """Put these in line: a client of release 0.1.0 has enqueued them, and knows no lines."""
        pipe = self.client.pipeline()
        for container_id, spec in specs.items():
            pipe.hset(sandbox_key(container_id), mapping=dict[Any, Any](needs_of(spec)))
        self._offer(keys=[], args=[time.time(), *specs], client=pipe)
        pipe.execute()

    def take(self, host: str, have: Mapping[str, Any], most: int = 1000) -> list[tuple[str, int]]:
        """Take for `host` what waits and fits, as (id, attempt); they are its own now.

        Args:
            have: `capacity`, `slots`, `memory` (bytes; 0: not counted), `each` (bytes that a sandbox counts
                for that asks for none), `labels`, and `rooms`: for each network how many more it can have
                (-1: no limit).
        """
        have = {"memory": 0, "each": 0, "labels": {}, "rooms": {}, **have, "kinds": KINDS}
        answer = self._take(keys=[], args=[host, now(), EVENTS_KEPT, json.dumps(have), most])
        return [(one, int(attempt)) for one, attempt in zip(answer[::2], answer[1::2], strict=True)]

    def offer_again(self, age_s: float) -> None:
        """Put in line what has waited for so long and stands in none."""
        ids = cast("list[str]", self.client.zrangebyscore(QUEUED, "-inf", time.time() - age_s, 0, CHUNK))
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            pipe.hmget(sandbox_key(container_id), ["state", "line", "spec"])
        answers = dict(zip(ids, pipe.execute(), strict=True))
        gone = [one for one, (state, _, _) in answers.items() if state != State.QUEUED]
        if gone:
            self.client.zrem(QUEUED, *gone)
        waiting = {
            one: spec for one, (state, line, spec) in answers.items() if state == State.QUEUED and not line
        }
        if waiting:
            self.offer({one: Spec.model_validate_json(spec) for one, spec in waiting.items()})

    # -- bells ---------------------------------------------------------------------------------------

    def ring(self, host: str | None = None) -> None:
        """Wake a host's puller, or all."""
        self.client.xadd(f"{BELL}:{host}" if host else BELL, {"look": "1"}, maxlen=BELLS_KEPT)

    def bells(self, host: str) -> dict[str, str]:
        """Marks in the streams that `wait_for_bell` waits on: from now on."""
        found = {}
        for name in (BELL, f"{BELL}:{host}"):
            last = cast("list[tuple[str, dict[str, str]]]", self.client.xrevrange(name, count=1))
            found[name] = last[0][0] if last else "0-0"
        return found

    def wait_for_bell(self, marks: dict[str, str], block_s: float) -> dict[str, str]:
        """Wait until one has rung after the marks, or the time is up; the new marks."""
        answer = self.client.xread(cast("dict[Any, Any]", marks), block=max(1, int(block_s * 1000)))
        rung = {name: entries[-1][0] for name, entries in cast("Any", answer) or []}
        return {**marks, **rung}


def where(spec: Spec) -> str:
    """Which hosts a sandbox waits for: one, those with labels, or any."""
    if spec.host is not None:
        return f"host:{spec.host}"
    return "on:" + ",".join(f"{name}={spec.on[name]}" for name in sorted(spec.on)) if spec.on else "any"


def line_of(spec: Spec) -> str:
    """The name of the line in which a sandbox waits; script TAKE reads it."""
    return "|".join((where(spec), spec.kind, str(spec.memory_bytes or 0), _networks(spec)))


def _networks(spec: Spec) -> str:
    return ",".join(one.name for one in spec.networks)


def needs_of(spec: Spec) -> dict[str, str]:
    """What script TAKE must know of a sandbox, and a table without reading its spec."""
    needs = {
        "line": line_of(spec),
        "queue": where(spec),
        "memory": str(spec.memory_bytes or 0),  # 0: as much as its host counts for such a one
        "nets": _networks(spec),
        "command": " ".join(spec.args)[:COMMAND_KEPT],
    }
    return {**needs, "reschedule": "1"} if spec.reschedule else needs
