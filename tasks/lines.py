"""What waits: the lines from which hosts take as much as they have room for.

A line is a sorted set of ids that need the same: which host, or which labels of a host, which networks, how
much memory. A host judges a line by its head, so that ten thousand that do not fit cost it nothing.

The queue is a part of the record, not of Celery: a list of messages hands its head to whoever comes, and
knows nothing of memory, labels, addresses or batches.
"""

import json
import re
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
    OLD_QUEUED,
    OPEN,
    SANDBOXES,
    TERMINAL_KEPT_S,
    UNCOUNTED,
    batch_key,
    host_key,
    line_key,
    sandbox_key,
    sealed_key,
)
from tasks.scripts import COUNT, OFFER, TAKE
from tasks.sealed import beside, kind_of, needs, parts, readable, seal
from tasks.signing import Signer
from tasks.state import State
from tasks.view import command_of
from worker.journal import now, seconds
from worker.spec import CONTAINER_ID, HOST_NAME, KINDS, Spec


class Lines(Batches):
    """The lines, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        super().__init__(client)
        self._take = client.register_script(TAKE)
        self._offer = client.register_script(OFFER)
        self._count = client.register_script(COUNT)

    def enqueue(
        self,
        batch: str,
        ids_and_specs: Sequence[tuple[str, Spec]],
        plan: BatchPlan | None = None,
        signer: Signer | None = None,
    ) -> None:
        """Write a batch and records of new ids as `queued`, and offer them to the hosts.

        The values of their environments are written beside the records, where no client reads them.

        Raises:
            BadInput: The plan asks for more successes than there are sandboxes, or a spec is too large.
        """
        plan = plan or BatchPlan()
        texts = [seal(spec) for _, spec in ids_and_specs]
        at, score, total = now(), time.time(), len(ids_and_specs)
        first = plan.first(total)
        key, fields = batch_key(batch), plan.fields(total)
        pipe = self.client.pipeline()
        pipe.hsetnx(key, "created_at", at)
        pipe.hdel(key, "outcome", "ended_at")  # one that is there grows
        pipe.hset(key, mapping=dict[Any, Any]({"open": 1, **fields}))
        for what in ("", ":ids", ":held"):  # its pins are the hosts': what runs is no client's to say
            pipe.persist(key + what)
        pipe.zadd(BATCHES, {batch: score}, nx=True)
        pipe.zadd(OPEN, {batch: score})
        pipe.execute()
        for start in range(0, total, CHUNK):
            part = ids_and_specs[start : start + CHUNK]
            free = part[: max(0, first - start)]
            pipe = self.client.pipeline()
            for (container_id, spec), text in zip(part, texts[start : start + CHUNK], strict=True):
                words = parts(container_id, batch, text, spec.env) if signer else []
                sealed = beside(spec, signer.sign("spec", words) if signer else None)
                raw = new_record(container_id, batch, State.QUEUED, at, spec, text)
                pipe.hset(sandbox_key(container_id), mapping=raw)
                if sealed is not None:
                    pipe.set(sealed_key(container_id), sealed)
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
            pipe.sadd(LINES, name)
        pipe.xadd(BELL, {"look": "1"}, maxlen=BELLS_KEPT)

    def offer(self, specs: Mapping[str, str]) -> None:
        """Put these in line, by their specs as JSON: a client of release 0.1.0 has enqueued them."""
        pipe = self.client.pipeline()
        for container_id, text in specs.items():
            pipe.hset(sandbox_key(container_id), mapping=dict[Any, Any](_needs_of(text)))
        self._offer(keys=[], args=[time.time(), *specs], client=pipe)
        pipe.execute()

    def take(self, host: str, have: Mapping[str, Any], most: int = 1000) -> list[tuple[str, int]]:
        """Take for `host` what waits and fits, as (id, attempt); they are its own now.

        Args:
            have: `capacity`, `slots`, `memory` (bytes; 0: not counted), `each` (bytes that a sandbox counts
                for that asks for none), `labels`, `rooms`: for each network how many more it can have
                (-1: no limit); `kinds` of specs, by default those of this release; `elder`: it is of
                release 0.1.0. With `owner` or `life` it gets nothing while its name is not its own, or
                while the broker lives another life than the one it has told all its sandboxes to.
        """
        return self._ask(host, have, most)[0]

    def take_and_admit(
        self, host: str, have: Mapping[str, Any], most: int = 1000
    ) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """As `take`, and what has waited here for an image and goes on now, which has its slots first."""
        return self._ask(host, {**have, "admits": True}, most)

    def _ask(
        self, host: str, have: Mapping[str, Any], most: int
    ) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        have = {"memory": 0, "each": 0, "labels": {}, "rooms": {}, "kinds": KINDS, "now": time.time(), **have}
        args: list[str | float] = [host, now(), EVENTS_KEPT, json.dumps(have), most]
        taken, admitted = (
            [
                (one, int(attempt))
                for one, attempt in zip(answer[::2], answer[1::2], strict=True)
                if CONTAINER_ID.fullmatch(one) and str(attempt).isdecimal()  # else somebody wrote it by hand
            ]
            for answer in self._take(keys=[], args=args)
        )
        return taken, admitted

    def count_waiting(self) -> int:
        """How many sandboxes wait in all lines for a host with room; not what its batch holds back."""
        pipe = self.client.pipeline(transaction=False)
        for name in cast("set[str]", self.client.smembers(LINES)):
            pipe.zcard(line_key(name))
        return sum(pipe.execute())

    def offer_again(self, age_s: float) -> None:
        """Put in line what a client of release 0.1.0 has enqueued so long ago and no host has offered."""
        ids = cast("list[str]", self.client.zrangebyscore(OLD_QUEUED, "-inf", time.time() - age_s))
        for start in range(0, len(ids), CHUNK):
            pipe = self.client.pipeline(transaction=False)
            for container_id in ids[start : start + CHUNK]:
                pipe.hmget(sandbox_key(container_id), ["state", "spec"])
            answers = dict(zip(ids[start : start + CHUNK], pipe.execute(), strict=True))
            gone = [one for one, (state, _) in answers.items() if state != State.QUEUED]
            if gone:
                self.client.zrem(OLD_QUEUED, *gone)
            if len(gone) < len(answers):
                self.offer({one: spec for one, (state, spec) in answers.items() if state == State.QUEUED})

    # -- beside release 0.1.0 ------------------------------------------------------------------------

    def note_for_elders(self, ids: Sequence[str]) -> None:
        """Let hosts of release 0.1.0 ask again for these, should messages be lost; and count their moves."""
        if ids:
            self.client.zadd(OLD_QUEUED, dict.fromkeys(ids, time.time()))
            self.client.sadd(UNCOUNTED, *ids)

    def count_moved(self) -> None:
        """Count for their batches what scripts of release 0.1.0 have moved."""
        ids = list(cast("set[str]", self.client.smembers(UNCOUNTED)))
        for start in range(0, len(ids), CHUNK):
            args: list[str | float] = [now(), time.time(), TERMINAL_KEPT_S, EVENTS_KEPT]
            self._count(keys=[], args=[*args, *ids[start : start + CHUNK]])

    def count_memory(self, host: str, each: int) -> None:
        """Note what the sandboxes on a host count for: a release before may have left it out."""
        key = host_key(host) + ":memory"
        ids = list(cast("set[str]", self.client.smembers(host_key(host) + ":sandboxes")))
        pipe = self.client.pipeline(transaction=False)
        for container_id in ids:
            pipe.hget(sandbox_key(container_id), "spec")
        found = {}
        for container_id, text in zip(ids, pipe.execute(), strict=True):
            if text is not None:
                found[container_id] = _bytes(readable(text).get("memory_bytes")) or each
        whole = self.client.pipeline()
        whole.delete(key)
        if found:
            whole.hset(key, mapping=dict[Any, Any](found))
        whole.execute()

    # -- bells ---------------------------------------------------------------------------------------

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
    return _line(spec, kind_of(spec))


def _line(spec: Spec, kind: str) -> str:
    return "|".join((where(spec), kind, str(spec.memory_bytes or 0), _networks(spec)))


def _needs_of(text: str) -> dict[str, str]:
    try:
        spec, kind = needs(text)
        return needs_of(spec, kind)
    except (ValueError, RecursionError, TypeError, AttributeError):
        # Of another release: it waits for a host that knows its kind, or refuses it with words.
        raw = readable(text)
        kind = re.sub(r"[^a-z0-9/.]", "_", str(raw.get("kind")))
        pinned = f"host:{raw['host']}" if HOST_NAME.fullmatch(str(raw.get("host") or "")) else "any"
        return {"line": f"{pinned}|{kind}|0|", "queue": pinned}


def _bytes(given: object) -> int:
    return given if isinstance(given, int) else 0


def _networks(spec: Spec) -> str:
    return ",".join(one.name for one in spec.networks)


def needs_of(spec: Spec, kind: str | None = None) -> dict[str, str]:
    """What script TAKE must know of a sandbox, and a table without reading its spec."""
    needs = {
        "line": _line(spec, kind or kind_of(spec)),
        "queue": where(spec),
        "memory": str(spec.memory_bytes or 0),  # 0: as much as its host counts for such a one
        "nets": _networks(spec),
        "command": command_of(spec.args),
    }
    return {**needs, "reschedule": "1"} if spec.reschedule else needs


def new_record(
    container_id: str, batch: str, state: State, created_at: str, spec: Spec, text: str, attempt: int = 1
) -> dict[Any, Any]:
    """The fields with which a record begins; `text`: the spec as everybody may see it."""
    return {
        "id": container_id,
        "batch": batch,
        "attempt": attempt,
        "state": str(state),
        "created_at": created_at,
        "spec": text,
        **needs_of(spec),
    }
