"""The record: what Redis knows of sandboxes, batches and hosts. What the CLI shows.

Each change is one script: compare attempt, sequence and state, write, emit the event.
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from tasks.scripts import CLAIM, MARK, MOVES_JSON, NAME, NO_RECORD, PUT, TERMINAL_JSON
from tasks.state import TERMINAL, State
from tasks.view import shape, view
from worker.journal import Journal, now, seconds
from worker.spec import Spec

PREFIX = "sandbatch:"
EVENTS = PREFIX + "events"
SANDBOXES = PREFIX + "sandboxes"  # sorted set: id by time of creation
DEADLINES = PREFIX + "deadlines"  # sorted set: id by its deadline, of what may still be queued
QUEUED = PREFIX + "queued"  # sorted set: id by the time of its last message, of what no host has taken
HOSTS = PREFIX + "hosts"
EPOCH = PREFIX + "epoch"  # whoever finds none makes one: it goes with the broker's data
SWEEPER = PREFIX + "sweeper"
EVENTS_KEPT = 100_000
TERMINAL_KEPT_S = 24 * 3600  # a record of an ended sandbox
HEARTBEAT_S = 5.0
HOST_LOST_S = 30.0


@dataclass(frozen=True)
class Wish:
    """What the record wants of a sandbox on a host. `placed_at_s` in seconds since the epoch."""

    container_id: str
    state: State
    attempt: int
    is_removed: bool
    placed_at_s: float
    stop_grace_s: float | None  # None: nobody has asked it to stop


class Record:
    """The record of all sandboxes, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._put = client.register_script(PUT)
        self._claim = client.register_script(CLAIM)
        self._mark = client.register_script(MARK)
        self._name = client.register_script(NAME)

    # -- sandboxes ---------------------------------------------------------------------------------

    def enqueue(self, batch: str, ids_and_specs: Sequence[tuple[str, Spec]]) -> None:
        """Write records of new ids as `queued`."""
        at, score = now(), time.time()
        for start in range(0, len(ids_and_specs), 1000):
            pipe = self.client.pipeline(transaction=False)
            for container_id, spec in ids_and_specs[start : start + 1000]:
                fields: dict[bytes | bytearray | memoryview | str | int | float, Any] = {
                    "id": container_id,
                    "batch": batch,
                    "attempt": 1,
                    "state": str(State.QUEUED),
                    "created_at": at,
                    "spec": spec.model_dump_json(),
                }
                pipe.hset(_key(container_id), mapping=fields)
                pipe.zadd(SANDBOXES, {container_id: score})
                pipe.zadd(QUEUED, {container_id: score})
                if spec.deadline_at is not None:
                    pipe.zadd(DEADLINES, {container_id: seconds(spec.deadline_at)})
            pipe.execute()

    def claim(self, container_id: str, host: str, attempt: int) -> bool:
        """Take a queued sandbox for `host`; True if it is this host's now."""
        keys = [_key(container_id), EVENTS, _host_key(host) + ":sandboxes", QUEUED]
        return bool(self._claim(keys=keys, args=[container_id, host, attempt, now(), EVENTS_KEPT]))

    def put(
        self,
        container_id: str,
        state: State,
        attempt: int,
        fields: dict[str, str],
        *,
        seq: int | None = None,
        host: str = "",
        only_from: State | None = None,
    ) -> int:
        """Move a record; see the script for the answers."""
        flat = [part for pair in fields.items() for part in pair]
        keys = [_key(container_id), EVENTS, _host_key(host) + ":sandboxes", QUEUED]
        args: list[str | int] = [container_id, str(state), now(), MOVES_JSON, TERMINAL_JSON, attempt]
        args += ["" if seq is None else seq, TERMINAL_KEPT_S, EVENTS_KEPT, str(only_from or "")]
        return int(self._put(keys=keys, args=[*args, *flat]))

    def report(self, journal: Journal, host: str) -> int:
        """Bring the record up to the journal; an older view than the record's changes nothing."""
        state, fields = view(journal)
        fields["host"] = host

        def put() -> int:
            return self.put(journal.container_id, state, journal.attempt, fields, seq=journal.seq, host=host)

        answer = put()
        if answer == NO_RECORD:
            self._rebuild(journal, host)
            answer = put()
        return answer

    def _rebuild(self, journal: Journal, host: str) -> None:
        """Begin the record of a sandbox anew: the broker has lost it, the host has not."""
        pipe = self.client.pipeline()
        pipe.hset(
            _key(journal.container_id),
            mapping={
                "id": journal.container_id,
                "batch": journal.batch,
                "attempt": journal.attempt,
                "state": str(State.PLACED),
                "created_at": journal.created_at,
                "spec": journal.spec.model_dump_json(),
                "host": host,
            },
        )
        pipe.zadd(SANDBOXES, {journal.container_id: seconds(journal.created_at)})
        pipe.sadd(_host_key(host) + ":sandboxes", journal.container_id)
        pipe.execute()

    def cancel(self, container_id: str, attempt: int) -> bool:
        """End a sandbox that no host has taken; False if one has."""
        return self.put(container_id, State.CANCELLED, attempt, {}, only_from=State.QUEUED) == 1

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
            self._mark(keys=[_key(container_id)], args=[name, value], client=pipe)
        pipe.execute()

    def overdue(self) -> list[tuple[str, int, str]]:
        """Queued sandboxes whose deadline has passed, as (id, attempt, deadline); each is told of once."""
        ids = cast("list[str]", self.client.zrangebyscore(DEADLINES, "-inf", time.time()))
        found = []
        for container_id in ids:
            state, attempt, spec = self.client.hmget(_key(container_id), ["state", "attempt", "spec"])
            if state == State.QUEUED and spec:
                found.append((container_id, int(attempt or 1), json.loads(spec)["deadline_at"]))
            else:  # a host has it, and its own clock
                self.client.zrem(DEADLINES, container_id)
        return found

    def is_wanted(self, container_id: str) -> bool:
        """False once somebody has removed it, or it has ended."""
        state, removed = self.client.hmget(_key(container_id), ["state", "removed"])
        return state is not None and state not in TERMINAL and removed != "1"

    def get(self, container_id: str) -> dict[str, Any] | None:
        """One sandbox in the shape of `--json` (CLI.md); None if there is no record."""
        raw = cast("dict[str, str]", self.client.hgetall(_key(container_id)))
        return shape(raw) if raw.get("state") else None

    def get_all(self, ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All sandboxes, or those of `ids`, oldest first; the index forgets records that have expired."""
        wanted = list(ids) if ids is not None else self.ids()
        found, gone = [], []
        for start in range(0, len(wanted), 1000):
            part = wanted[start : start + 1000]
            pipe = self.client.pipeline(transaction=False)
            for container_id in part:
                pipe.hgetall(_key(container_id))
            for container_id, raw in zip(part, pipe.execute(), strict=True):
                if raw.get("state"):
                    found.append(shape(raw))
                else:
                    gone.append(container_id)
        if gone and ids is None:
            self.client.zrem(SANDBOXES, *gone)
        return found

    def ids(self) -> list[str]:
        return cast("list[str]", self.client.zrange(SANDBOXES, 0, -1))

    def spec(self, container_id: str) -> tuple[str, str] | None:
        """The spec as JSON, and the batch; None if there is no record."""
        spec, batch = cast("list[str | None]", self.client.hmget(_key(container_id), ["spec", "batch"]))
        return (spec, batch or "") if spec else None

    def wishes_on(self, host: str) -> list[Wish]:
        """What the record has on a host and not ended."""
        ids = sorted(cast("set[str]", self.client.smembers(_host_key(host) + ":sandboxes")))
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            pipe.hmget(_key(container_id), ["state", "attempt", "removed", "placed_at", "stop"])
        found = []
        for container_id, (state, attempt, removed, placed_at, stop) in zip(ids, pipe.execute(), strict=True):
            if state is None or state in TERMINAL:
                self.client.srem(_host_key(host) + ":sandboxes", container_id)
                continue
            placed_s = seconds(placed_at) if placed_at else 0.0
            grace_s = float(stop) if stop else None
            found.append(Wish(container_id, State(state), int(attempt), removed == "1", placed_s, grace_s))
        return found

    def long_queued(self, age_s: float) -> list[tuple[str, int, str | None]]:
        """Sandboxes whose last message is older than `age_s`, as (id, attempt, the host it asks for)."""
        ids = cast("list[str]", self.client.zrangebyscore(QUEUED, "-inf", time.time() - age_s))
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            pipe.hmget(_key(container_id), ["attempt", "spec"])
        found = []
        for container_id, (attempt, spec) in zip(ids, pipe.execute(), strict=True):
            if spec is None:
                self.client.zrem(QUEUED, container_id)
                continue
            found.append((container_id, int(attempt), json.loads(spec).get("host")))
        return found

    def sent_again(self, ids: Sequence[str]) -> None:
        """Note that their messages have been published anew."""
        if ids:
            self.client.zadd(QUEUED, {container_id: time.time() for container_id in ids}, xx=True)

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

    # -- hosts -------------------------------------------------------------------------------------

    def take_name(self, host: str, owner: str) -> bool:
        """Take or keep the name of a host for `owner`; False while another machine lives under it."""
        return bool(self._name(keys=[_host_key(host) + ":owner"], args=[owner, int(HOST_LOST_S)]))

    def heartbeat(self, host: str, facts: dict[str, Any]) -> str:
        """Say that `host` lives, and what it is and has; returns which life of the broker heard it.

        Another answer than the last one means that the broker was restarted or has lost its data.
        """
        pipe = self.client.pipeline()
        pipe.sadd(HOSTS, host)
        pipe.set(
            _host_key(host), json.dumps({**facts, "name": host, "heartbeat_at": now()}), ex=int(HOST_LOST_S)
        )
        pipe.set(EPOCH, secrets.token_hex(8), nx=True)
        pipe.get(EPOCH)
        pipe.info("server")
        answers = pipe.execute()
        return f"{answers[-2]}.{answers[-1].get('run_id', '')}"

    def live_hosts(self) -> dict[str, dict[str, Any]]:
        """The hosts with a heartbeat, by name."""
        names = sorted(cast("set[str]", self.client.smembers(HOSTS)))
        facts = (
            cast("list[str | None]", self.client.mget([_host_key(name) for name in names])) if names else []
        )
        return {name: json.loads(text) for name, text in zip(names, facts, strict=True) if text}

    def leave(self, host: str) -> None:
        self.client.delete(_host_key(host), _host_key(host) + ":owner")


def _key(container_id: str) -> str:
    return f"{PREFIX}sb:{container_id}"


def _host_key(host: str) -> str:
    return f"{PREFIX}host:{host}"
