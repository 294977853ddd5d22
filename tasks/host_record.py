"""Hosts in the record: who lives, under which name, and what it says of itself."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

import redis

from tasks.host_scripts import ALL, DRAIN, FORGET, LOST_OF, MISSING, NAME, RESCHEDULE
from tasks.keys import (
    BELL,
    BELLS_KEPT,
    DRAINS,
    EPOCH,
    EVENTS_KEPT,
    HOSTS,
    LAST_HOSTS,
    TAKEN_KEPT_S,
    host_key,
)
from tasks.state import TERMINAL, UNKNOWN, State
from worker.journal import now
from worker.spec import CONTAINER_ID

HEARTBEAT_S = 5.0
HOST_LOST_S = 30.0
LIVE, LOST, STOPPED = "live", "lost", "stopped"

Facts = dict[str, Any]


class Hosts:
    """The hosts, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._name = client.register_script(NAME)
        self._all_hosts = client.register_script(ALL)
        self._drain = client.register_script(DRAIN)
        self._forget = client.register_script(FORGET)
        self._lost = client.register_script(LOST_OF)
        self._missing = client.register_script(MISSING)
        self._reschedule = client.register_script(RESCHEDULE)

    def take_name(self, host: str, owner: str) -> bool:
        """Take or keep the name of a host for `owner`; False while another machine lives under it."""
        return bool(self._name(keys=[host_key(host) + ":owner"], args=[owner, int(HOST_LOST_S)]))

    def heartbeat(self, host: str, facts: Facts) -> str:
        """Say that `host` lives, and what it is and has; returns which life of the broker heard it.

        Another answer than the last one means that the broker was restarted or has lost its data.
        """
        said = json.dumps({**facts, "name": host, "heartbeat_at": now()})
        pipe = self.client.pipeline()
        pipe.sadd(HOSTS, host)
        pipe.set(host_key(host), said, ex=int(HOST_LOST_S))
        pipe.hset(LAST_HOSTS, host, said)
        pipe.set(EPOCH, secrets.token_hex(8), nx=True)
        pipe.get(EPOCH)
        pipe.info("server")
        answers = pipe.execute()
        return f"{answers[-2]}.{answers[-1].get('run_id', '')}"

    def is_live(self, host: str) -> bool:
        """It has been heard of within the last `HOST_LOST_S`."""
        return bool(self.client.exists(host_key(host)))

    def all_hosts(self) -> dict[str, Facts]:
        """What each host that is known says of itself, or said last, by name.

        `state` is live, lost (silent for `HOST_LOST_S`) or stopped (it said so); what the record itself
        knows is of this moment: `sandboxes`, `launching`, `memory_asked`, `drained`.
        """
        answer = self._all_hosts(keys=[], args=[])
        found: dict[str, Facts] = {}
        for name, heard, last, drain, sandboxes, launching, memory in zip(
            *(answer[number::7] for number in range(7)), strict=True
        ):
            if not heard and not last:
                continue  # of a release before that noted nothing, and silent
            facts = json.loads(heard or last)
            left = facts.pop("left", False)
            facts["state"] = LIVE if heard else STOPPED if left else LOST
            if facts.get("pulls"):  # an older one has no others than its own numbers
                facts |= {"sandboxes": sandboxes, "launching": launching, "memory_asked": int(memory)}
            if drain:
                wish = json.loads(drain)
                facts["drained"] = wish if wish["drained"] else None
            found[name] = facts
        return found

    def live_hosts(self) -> dict[str, Facts]:
        """The hosts with a heartbeat, by name."""
        return {name: facts for name, facts in self.all_hosts().items() if facts["state"] == LIVE}

    def leave(self, host: str) -> None:
        """Say that `host` stops, its sandboxes go on: it is not lost."""
        last = cast("str | None", self.client.hget(LAST_HOSTS, host))
        pipe = self.client.pipeline()
        if last is not None:
            pipe.hset(LAST_HOSTS, host, json.dumps({**json.loads(last), "left": True}))
        pipe.delete(host_key(host), host_key(host) + ":owner")
        pipe.execute()

    def ids_on(self, host: str) -> list[str]:
        """What a host has and has not ended, as far as the record goes."""
        found = cast("set[str]", self.client.smembers(host_key(host) + ":sandboxes"))
        return sorted(one for one in found if CONTAINER_ID.fullmatch(one))  # it becomes a name of a folder

    def drop_host(self, host: str) -> bool:
        """Forget a host whose sandboxes have ended in the record; False if it lives."""
        return bool(self._forget(keys=[], args=[host]))

    # -- lost ------------------------------------------------------------------------------------------

    def mark_unknown(self, rows: Sequence[Facts]) -> None:
        """Show what a lost host has, and has not ended, as `unknown`; `last_state` is what it said last."""
        there: dict[str, list[Facts]] = {}
        for row in rows:
            row["last_state"] = None
            if row["host"] is not None and row["state"] != State.QUEUED and row["state"] not in TERMINAL:
                there.setdefault(row["host"], []).append(row)
        for host in self._lost(keys=[], args=list(there)) if there else []:
            for row in there[host]:
                row["last_state"], row["state"] = row["state"], UNKNOWN

    def missing_hosts(self, sweeps: int) -> list[str]:
        """The hosts that so many sweeps in a row have found lost; this call is one of them."""
        return cast("list[str]", self._missing(keys=[], args=[sweeps]))

    def reschedule(self, container_id: str, new_id: str, host: str) -> bool:
        """Put a new sandbox in the place of one on a lost host; False if that one is not to be launched anew.

        Two who try the same at the same time make one.
        """
        args: list[str | float] = [container_id, new_id, host, now(), time.time(), EVENTS_KEPT, TAKEN_KEPT_S]
        return bool(self._reschedule(keys=[], args=args))

    # -- drain -----------------------------------------------------------------------------------------

    def ring(self, host: str | None = None) -> None:
        """Wake a host's puller, or all."""
        self.client.xadd(f"{BELL}:{host}" if host else BELL, {"look": "1"}, maxlen=BELLS_KEPT)

    def drain(self, host: str, drained: bool, why: str = "") -> None:
        """Let a host take no more work, or take it again; it need not be up."""
        wish = {"drained": drained, "at": time.time(), "why": why}
        self._drain(keys=[], args=[host, json.dumps(wish), "1"])
        self.ring(host)

    def drain_of(self, host: str) -> Facts | None:
        """The newest wish, as {drained, at, why}; None if nobody has ever drained it."""
        wish = cast("str | None", self.client.hget(DRAINS, host))
        return json.loads(wish) if wish else None

    def restore_drain(self, host: str, wish: Facts) -> None:
        """Note a wish that the broker has lost; a newer one stays."""
        self._drain(keys=[], args=[host, json.dumps(wish), ""])
