"""Hosts in the record: who lives, under which name, and what it says of itself."""

import json
import secrets
from typing import Any, cast

import redis

from tasks.keys import EPOCH, HOSTS, host_key
from tasks.scripts import NAME
from worker.journal import now

HEARTBEAT_S = 5.0
HOST_LOST_S = 30.0


class Hosts:
    """The hosts, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._name = client.register_script(NAME)

    def take_name(self, host: str, owner: str) -> bool:
        """Take or keep the name of a host for `owner`; False while another machine lives under it."""
        return bool(self._name(keys=[host_key(host) + ":owner"], args=[owner, int(HOST_LOST_S)]))

    def heartbeat(self, host: str, facts: dict[str, Any]) -> str:
        """Say that `host` lives, and what it is and has; returns which life of the broker heard it.

        Another answer than the last one means that the broker was restarted or has lost its data.
        """
        pipe = self.client.pipeline()
        pipe.sadd(HOSTS, host)
        pipe.set(
            host_key(host), json.dumps({**facts, "name": host, "heartbeat_at": now()}), ex=int(HOST_LOST_S)
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
            cast("list[str | None]", self.client.mget([host_key(name) for name in names])) if names else []
        )
        return {name: json.loads(text) for name, text in zip(names, facts, strict=True) if text}

    def leave(self, host: str) -> None:
        self.client.delete(host_key(host), host_key(host) + ":owner")
