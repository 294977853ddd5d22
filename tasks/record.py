"""The record: what Redis knows of sandboxes, batches and hosts. What the CLI shows.

Each change is one script: compare attempt, sequence and state, write, count, emit the event.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from tasks.host_record import Hosts
from tasks.keys import (
    BATCHES,
    CHUNK,
    DEADLINES,
    EVENTS,
    EVENTS_KEPT,
    SANDBOXES,
    SWEEPER,
    TAKEN_KEPT_S,
    TERMINAL_KEPT_S,
    batch_key,
    host_key,
    sandbox_key,
    sealed_key,
    taken_key,
)
from tasks.lines import Lines, new_record
from tasks.pulls import Pulls
from tasks.scripts import MARK, NO_RECORD, PUT
from tasks.sealed import beside, readable, seal, unseal
from tasks.state import TERMINAL, State
from tasks.view import shape, view
from worker.journal import Journal, now, seconds
from worker.settings import MEMORY_PER_SANDBOX
from worker.spec import Spec

FIRST_ATTEMPT = 1  # what is queued has no other


@dataclass(frozen=True)
class Wish:
    """What the record wants of a sandbox on a host. `placed_at_s` in seconds since the epoch."""

    container_id: str
    state: State
    attempt: int
    is_removed: bool
    is_cancelled: bool
    is_replaced: bool  # another is launched in its place
    placed_at_s: float
    stop_grace_s: float | None  # None: nobody has asked it to stop


class Record(Lines, Hosts, Pulls):
    """All sandboxes, and (`Lines`, `Batches`, `Hosts`, `Pulls`) the rest, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        Lines.__init__(self, client)
        Hosts.__init__(self, client)
        Pulls.__init__(self, client)
        self._put = client.register_script(PUT)
        self._mark = client.register_script(MARK)

    def put(
        self,
        container_id: str,
        state: State,
        attempt: int,
        fields: dict[str, str],
        *,
        seq: int | None = None,
        only_from: State | None = None,
    ) -> int:
        """Move a record; see the script for the answers."""
        return int(self._put(keys=[], args=_put_args(container_id, state, attempt, fields, seq, only_from)))

    def report(self, journal: Journal, host: str) -> int:
        """Bring the record up to the journal; an older view than the record's changes nothing."""
        state, fields = view(journal)
        fields["host"] = host

        def put() -> int:
            return self.put(journal.container_id, state, journal.attempt, fields, seq=journal.seq)

        answer = put()
        if answer == NO_RECORD:
            self._rebuild(journal, host)
            answer = put()
        return answer

    def _rebuild(self, journal: Journal, host: str) -> None:
        """Begin the record of a sandbox anew: the broker has lost it, the host has not."""
        pipe, container_id, key = self.client.pipeline(), journal.container_id, batch_key(journal.batch)
        spec, begun_at = journal.asked, journal.created_at
        signed = journal.signed or {}
        text, sealed = signed.get("spec") or seal(spec), beside(spec, signed.get("token"))
        raw = new_record(container_id, journal.batch, State.PLACED, begun_at, spec, text, journal.attempt)
        pipe.hset(sandbox_key(container_id), mapping={**raw, "host": host})
        if sealed is not None:
            pipe.set(sealed_key(container_id), sealed)
        if signed:
            pipe.hset(sandbox_key(container_id), "signed_as", signed["as"])
            pipe.set(taken_key(signed["as"]), f"{host} {container_id}", nx=True, ex=TAKEN_KEPT_S)
        pipe.zadd(SANDBOXES, {container_id: seconds(journal.created_at)})
        pipe.sadd(host_key(host) + ":sandboxes", container_id)
        memory = journal.spec.memory_bytes or MEMORY_PER_SANDBOX
        pipe.hset(host_key(host) + ":memory", container_id, memory)
        pipe.hsetnx(key, "created_at", journal.created_at)  # its batch, without the rule
        pipe.zadd(BATCHES, {journal.batch: seconds(journal.created_at)}, nx=True)
        pipe.rpush(key + ":ids", container_id)
        for counter in ("total", "released"):
            pipe.hincrby(key, counter, 1)
        pipe.execute()
        image, digest = journal.asked.image, journal.facts.get("image_digest")
        if image and digest:  # the others of its batch are to run the same
            self.pin(journal.batch, image, digest)

    def cancel(self, container_id: str, attempt: int) -> bool:
        """End a sandbox that no host has taken; False if one has."""
        return self.put(container_id, State.CANCELLED, attempt, {}, only_from=State.QUEUED) > 0

    def cancel_all(self, ids: Sequence[str]) -> list[str]:
        """Mark these as cancelled, and end those that no host has taken; the ids of the others.

        First the marks: a host that has just taken one drops it again.
        """
        self._mark_all("cancel", dict.fromkeys(ids, "1"))
        left: list[str] = []
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            pipe = self.client.pipeline(transaction=False)
            for container_id in part:
                fields = {"reason": "cancel"}
                args = _put_args(container_id, State.CANCELLED, FIRST_ATTEMPT, fields, None, State.QUEUED)
                self._put(keys=[], args=args, client=pipe)
            left += [one for one, answer in zip(part, pipe.execute(), strict=True) if answer < 0]
        return left

    def mark_removed(self, container_ids: Sequence[str]) -> None:
        """Note that these are to end: a host that has just taken one drops it again, `ls` leaves it out.

        The record itself goes some time after the sandbox's end.
        """
        self._mark_all("removed", dict.fromkeys(container_ids, "1"))

    def mark_stopped(self, graces: dict[str, float]) -> None:
        """Note the grace in seconds of those that are to stop; a message that is lost is published again."""
        self._mark_all("stop", {container_id: str(grace) for container_id, grace in graces.items()})

    def _mark_all(self, name: str, values: dict[str, str]) -> None:
        pipe = self.client.pipeline(transaction=False)
        for container_id, value in values.items():
            self._mark(keys=[], args=[container_id, name, value], client=pipe)
        pipe.execute()

    def overdue(self) -> list[tuple[str, int, str]]:
        """Queued sandboxes whose deadline has passed, as (id, attempt, deadline); each is told of once."""
        ids = cast("list[str]", self.client.zrangebyscore(DEADLINES, "-inf", time.time()))
        found = []
        for container_id in ids:
            state, attempt, spec = self.client.hmget(sandbox_key(container_id), ["state", "attempt", "spec"])
            if state == State.QUEUED and spec:
                found.append((container_id, int(attempt or 1), str(readable(str(spec)).get("deadline_at"))))
            else:  # a host has it, and its own clock
                self.client.zrem(DEADLINES, container_id)
        return found

    def placement(self, container_id: str) -> tuple[str, str, int] | None:
        """State, host and attempt; None if there is no record."""
        found = self.client.hmget(sandbox_key(container_id), ["state", "host", "attempt"])
        state, host, attempt = cast("list[str | None]", found)
        return (state, host or "", int(attempt or 1)) if state else None

    def is_wanted(self, container_id: str) -> bool:
        """False once somebody has removed it, or it has ended, or another is launched in its place."""
        fields = ["state", "removed", "cancel", "replaced_by"]
        state, *marks = self.client.hmget(sandbox_key(container_id), fields)
        return state is not None and state not in TERMINAL and not any(marks)

    def get(self, container_id: str) -> dict[str, Any] | None:
        """One sandbox in the shape of `--json` (CLI.md); None if there is no record."""
        raw = cast("dict[str, str]", self.client.hgetall(sandbox_key(container_id)))
        if not raw.get("state"):
            return None
        row = shape(raw)
        self.mark_unknown([row])
        return row

    def get_all(self, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All sandboxes, or those of `ids`, oldest first; the index forgets records that have expired."""
        wanted = list(ids) if ids is not None else self.ids()
        found, gone = [], []
        for start in range(0, len(wanted), CHUNK):
            part = wanted[start : start + CHUNK]
            pipe = self.client.pipeline(transaction=False)
            for container_id in part:
                pipe.hgetall(sandbox_key(container_id))
            for container_id, raw in zip(part, pipe.execute(), strict=True):
                if raw.get("state"):
                    found.append(shape(raw))
                else:
                    gone.append(container_id)
        if gone and ids is None:
            self.forget_expired(gone)
        self.mark_unknown(found)
        return found

    def ids(self) -> list[str]:
        return cast("list[str]", self.client.zrange(SANDBOXES, 0, -1))

    def forget_expired(self, ids: Sequence[str]) -> None:
        """Take those of whom there is no record any more from the index, and what lies beside the record."""
        self.client.zrem(SANDBOXES, *ids)
        for start in range(0, len(ids), CHUNK):  # an end that a script of release 0.1.0 wrote leaves it
            self.client.delete(*map(sealed_key, ids[start : start + CHUNK]))

    def spec(self, container_id: str) -> tuple[str, str] | None:
        """The spec as JSON, of its environment the names, and the batch; None if there is no record."""
        spec, batch = cast(
            "list[str | None]", self.client.hmget(sandbox_key(container_id), ["spec", "batch"])
        )
        return (spec, batch or "") if spec else None

    def sealed(self, container_id: str) -> str | None:
        """What lies beside a record; for hosts: the broker lets no client read it."""
        return cast("str | None", self.client.get(sealed_key(container_id)))

    def whole_spec(self, container_id: str, text: str) -> Spec:
        """The spec with the values of its environment; for hosts, as above.

        Raises:
            BadInput: It is none, as the host sees it.
        """
        return unseal(text, self.sealed(container_id))

    def wishes_on(self, host: str) -> list[Wish]:
        """What the record has on a host and not ended."""
        ids = self.ids_on(host)
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            fields = ["state", "attempt", "removed", "cancel", "replaced_by", "placed_at", "stop"]
            pipe.hmget(sandbox_key(container_id), fields)
        found = []
        for container_id, answer in zip(ids, pipe.execute(), strict=True):
            state, attempt, removed, cancelled, successor, placed_at, stop = answer
            if state is None or state in TERMINAL:
                self.client.srem(host_key(host) + ":sandboxes", container_id)
                self.client.hdel(host_key(host) + ":memory", container_id)
                continue
            found.append(
                Wish(
                    container_id,
                    State(state),
                    int(attempt),
                    is_removed=removed == "1",
                    is_cancelled=cancelled == "1",
                    is_replaced=bool(successor),
                    placed_at_s=seconds(placed_at) if placed_at else 0.0,
                    stop_grace_s=float(stop) if stop else None,
                )
            )
        return found

    def ended(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` whose records say that they have ended."""
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            pipe.hget(sandbox_key(container_id), "state")
        return [one for one, state in zip(ids, pipe.execute(), strict=True) if state in TERMINAL]

    def may_sweep(self, period_s: float) -> bool:
        """True for one worker of the fleet in each period."""
        return bool(self.client.set(SWEEPER, "1", nx=True, px=int(period_s * 1000)))

    # -- events ------------------------------------------------------------------------------------

    def last_event(self) -> str:
        """A mark in the stream: `follow` from it misses nothing that comes after this call."""
        last = cast("list[tuple[str, dict[str, str]]]", self.client.xrevrange(EVENTS, count=1))
        return last[0][0] if last else "0-0"

    def follow(self, since: str, block_s: float) -> Iterator[tuple[str, dict[str, str]]]:
        """The events after `since`; waits up to `block_s` for the first."""
        answer = self.client.xread({EVENTS: since}, count=1000, block=max(1, int(block_s * 1000)))
        for _, events in cast("Iterable[tuple[str, list[tuple[str, dict[str, str]]]]]", answer or []):
            yield from events


def _put_args(
    container_id: str,
    state: State,
    attempt: int,
    fields: Mapping[str, str],
    seq: int | None,
    only_from: State | None,
) -> list[str | int | float]:
    args: list[str | int | float] = [container_id, str(state), now(), attempt, "" if seq is None else seq]
    args += [TERMINAL_KEPT_S, EVENTS_KEPT, str(only_from or ""), time.time()]
    return [*args, *(part for pair in fields.items() for part in pair)]
