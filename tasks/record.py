"""The record: what Redis knows of sandboxes, batches and hosts. What the CLI shows.

Each change is one script: compare attempt, sequence and state, write, emit the event.
"""

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from tasks.state import MOVES, TERMINAL, State
from worker.errors import BadInput, BrokerError
from worker.journal import Journal, now
from worker.settings import Settings
from worker.spec import Spec

PREFIX = "sandbatch:"
EVENTS = PREFIX + "events"
SANDBOXES = PREFIX + "sandboxes"  # sorted set: id by time of creation
QUEUED = PREFIX + "queued"  # sorted set: id by the time of its last message, of what no host has taken
HOSTS = PREFIX + "hosts"
EPOCH = PREFIX + "epoch"  # whoever finds none makes one: it goes with the broker's data
SWEEPER = PREFIX + "sweeper"
EVENTS_KEPT = 100_000
TERMINAL_KEPT_S = 24 * 3600  # a record of an ended sandbox
HEARTBEAT_S = 5.0
NO_RECORD = -2  # an answer of _PUT
HOST_LOST_S = 30.0

_MOVES_JSON = json.dumps({str(old): [str(new) for new in news] for old, news in MOVES.items()})
_TERMINAL_JSON = json.dumps([str(state) for state in TERMINAL])

# KEYS: record, events, sandboxes of the host, queued.  ARGV: id, state to come, now, moves, terminal states,
# attempt, seq ('' = not from a journal), expiry of terminal records in s, length of the stream, the
# state that it must be in ('' = any), then field, value, ...
# Answers: 1 written, 0 nothing new, -1 fenced off (an older attempt, or no such move), -2 no such record.
_PUT = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return -2 end
if ARGV[10] ~= '' and ARGV[10] ~= state then return -1 end
local attempt = tonumber(redis.call('HGET', KEYS[1], 'attempt'))
if tonumber(ARGV[6]) < attempt then return -1 end
if ARGV[7] ~= '' then
  local seq = tonumber(redis.call('HGET', KEYS[1], 'seq') or '0')
  if tonumber(ARGV[6]) == attempt and tonumber(ARGV[7]) <= seq then return 0 end
end
local target = ARGV[2]
if target ~= state then
  local allowed = false
  for _, move in ipairs(cjson.decode(ARGV[4])[state]) do
    if move == target then allowed = true end
  end
  if not allowed then return -1 end
end
redis.call('HSET', KEYS[1], 'state', target, 'attempt', ARGV[6])
if ARGV[7] ~= '' then redis.call('HSET', KEYS[1], 'seq', ARGV[7]) end
for i = 11, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
if target ~= state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  local host = redis.call('HGET', KEYS[1], 'host') or ''
  local batch = redis.call('HGET', KEYS[1], 'batch') or ''
  local terminal = false
  for _, name in ipairs(cjson.decode(ARGV[5])) do
    if name == target then terminal = true end
  end
  if terminal then
    redis.call('HSETNX', KEYS[1], 'ended_at', ARGV[3])
    redis.call('EXPIRE', KEYS[1], ARGV[8])
    redis.call('SREM', KEYS[3], ARGV[1])
  end
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[9], '*',
             'id', ARGV[1], 'batch', batch, 'state', target, 'host', host, 't', ARGV[3])
end
return 1
"""

# KEYS: record, events, sandboxes of the host, queued.  ARGV: id, host, attempt, now, length of the stream.
# Answers: 1 claimed, 2 was mine already, 0 not to be had.
_CLAIM = """
local state = redis.call('HGET', KEYS[1], 'state')
local attempt = redis.call('HGET', KEYS[1], 'attempt')
if not state or attempt ~= ARGV[3] or redis.call('HGET', KEYS[1], 'removed') then return 0 end
if state == 'placed' and redis.call('HGET', KEYS[1], 'host') == ARGV[2] then return 2 end
if state ~= 'queued' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'placed', 'host', ARGV[2], 'placed_at', ARGV[4])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'id', ARGV[1],
           'batch', redis.call('HGET', KEYS[1], 'batch') or '', 'state', 'placed',
           'host', ARGV[2], 't', ARGV[4])
return 1
"""

# KEYS: record. Only where there is one: a field by itself would make a record without an end.
_MARK = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'removed', '1') end"

# KEYS: owner of a host's name.  ARGV: owner, seconds.
_NAME = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""


@dataclass(frozen=True)
class Wish:
    """What the record wants of a sandbox on a host. `placed_at_s` in seconds since the epoch."""

    container_id: str
    state: State
    attempt: int
    is_removed: bool
    placed_at_s: float


def connect(settings: Settings, *, patient: bool = False) -> "redis.Redis":
    """A client of the broker's Redis; `patient` ones outlive a short restart of it.

    Raises:
        BadInput: The broker's URL has an option that is none.
    """
    url = settings.broker_url or f"unix://{settings.broker_socket}"
    url = url.replace("redis+socket://", "unix://", 1)
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), 8 if patient else 0)
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=30 if patient else 4,
            socket_connect_timeout=4,
            retry=retry,
        )
    except ValueError as error:
        raise BadInput(f"broker {public_url(settings)}", str(error), "check SANDBATCH_BROKER_URL") from None


def check(client: "redis.Redis", settings: Settings) -> None:
    """Ask the broker for a sign of life.

    Raises:
        BrokerError: None within some seconds; the error names the URL without its password.
        BadInput: The broker's URL has an option that is none.
    """
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerError(f"broker {public_url(settings)}", _reason(error), _todo(settings)) from None
    except TypeError as error:  # redis-py makes an argument of whatever stands behind the `?`
        raise BadInput(f"broker {public_url(settings)}", str(error), "check SANDBATCH_BROKER_URL") from None


def public_url(settings: Settings) -> str:
    """The broker's URL without its password."""
    url = settings.broker_url or f"redis+socket://{settings.broker_socket}"
    scheme, _, rest = url.partition("://")
    login, at, place = re.sub(r"(?<=[?&]password=)[^&]*", "***", rest).rpartition("@")
    user = login.partition(":")[0]
    return f"{scheme}://{user + ':***@' if at else ''}{place}"


class Record:
    """The record of all sandboxes, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._put = client.register_script(_PUT)
        self._claim = client.register_script(_CLAIM)
        self._mark = client.register_script(_MARK)
        self._name = client.register_script(_NAME)

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
        args: list[str | int] = [container_id, str(state), now(), _MOVES_JSON, _TERMINAL_JSON, attempt]
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
        pipe.zadd(SANDBOXES, {journal.container_id: datetime.fromisoformat(journal.created_at).timestamp()})
        pipe.sadd(_host_key(host) + ":sandboxes", journal.container_id)
        pipe.execute()

    def cancel(self, container_id: str, attempt: int) -> bool:
        """End a sandbox that no host has taken; False if one has."""
        return self.put(container_id, State.CANCELLED, attempt, {}, only_from=State.QUEUED) == 1

    def mark_removed(self, container_ids: Sequence[str]) -> None:
        """Note that these are to end: a host that has just taken one drops it again, `ls` leaves it out.

        The record itself goes some time after the sandbox's end.
        """
        pipe = self.client.pipeline(transaction=False)
        for container_id in container_ids:
            self._mark(keys=[_key(container_id)], client=pipe)
        pipe.execute()

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
            pipe.hmget(_key(container_id), ["state", "attempt", "removed", "placed_at"])
        found = []
        for container_id, (state, attempt, removed, placed_at) in zip(ids, pipe.execute(), strict=True):
            if state is None or state in TERMINAL:
                self.client.srem(_host_key(host) + ":sandboxes", container_id)
                continue
            placed_s = datetime.fromisoformat(placed_at).timestamp() if placed_at else 0.0
            found.append(Wish(container_id, State(state), int(attempt), removed == "1", placed_s))
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


def view(journal: Journal) -> tuple[State, dict[str, str]]:
    """What a journal says, as state and fields of a record."""
    facts = journal.facts
    fields = {"stages": json.dumps([run.__dict__ for run in journal.runs])}
    ips = journal.data.get("network", {}).get("ips", [])
    if ips:
        fields |= {"ip": ips[0], "ips": json.dumps(ips)}
    for name in ("exit_code", "running_at", "ended_at"):
        if facts.get(name) is not None:
            fields[name] = str(facts[name])
    if facts.get("error"):
        fields["error"] = json.dumps(facts["error"])
    current = [run.name for run in journal.runs if run.verb == "do"]
    fields["stage"] = current[-1] if current else ""
    return _state(journal), fields


def shape(raw: dict[str, str]) -> dict[str, Any]:
    """A record in the shape of `--json` of a sandbox (CLI.md)."""
    spec = json.loads(raw.get("spec") or "{}")
    stages = [{"do|undo": run["verb"], **run} for run in json.loads(raw.get("stages") or "[]")]
    return {
        "id": raw["id"],
        "batch": raw.get("batch"),
        "labels": spec.get("labels", {}),
        "state": raw["state"],
        "stage": raw.get("stage") or None,
        "attempt": int(raw.get("attempt") or 1),
        "host": raw.get("host") or spec.get("host"),
        "network": spec.get("network"),
        "ip": raw.get("ip"),
        "ips": json.loads(raw.get("ips") or "[]"),
        "image": spec.get("rootfs"),
        "args": spec.get("args", []),
        "created_at": raw.get("created_at"),
        "running_at": raw.get("running_at"),
        "ended_at": raw.get("ended_at"),
        "exit_code": int(raw["exit_code"]) if raw.get("exit_code") else None,
        "error": json.loads(raw["error"]) if raw.get("error") else None,
        "removed": raw.get("removed") == "1",
        "stages": stages,
        "spec": spec,
    }


def _state(journal: Journal) -> State:
    if journal.final:
        return State(journal.final)
    if journal.facts.get("stuck"):
        return State.STUCK
    if journal.is_unwinding:
        return State.UNDOING if journal.facts["wanted"] == State.FAILED else State.STOPPING
    if journal.is_done("ready"):
        return State.RUNNING
    return State.LAUNCHING


def _key(container_id: str) -> str:
    return f"{PREFIX}sb:{container_id}"


def _host_key(host: str) -> str:
    return f"{PREFIX}host:{host}"


def _reason(error: Exception) -> str:
    if isinstance(error, redis.AuthenticationError):
        return "refused the password"
    return str(error).split("\n")[0][:200] or type(error).__name__


def _todo(settings: Settings) -> str:
    if settings.is_broker_embedded:
        return "start it with sandbatch up, or name another with SANDBATCH_BROKER_URL"
    return "check SANDBATCH_BROKER_URL and that the broker runs"
