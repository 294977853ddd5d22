"""Release 0.1.0 as it was: its scripts and its words, recorded in tests/data/0.1.0."""

import json
import time
from pathlib import Path
from typing import Any

from tasks.keys import PREFIX
from tasks.record import Record
from worker.journal import now

DATA = Path(__file__).parents[1] / "data" / "0.1.0"
WORDS = json.loads((DATA / "words.json").read_text())
EVENTS, OLD_QUEUED = PREFIX + "events", PREFIX + "queued"


class Elder:
    """What release 0.1.0 does to the record, as a host and as a client."""

    def __init__(self, client: Any, record: Record, host: str = "old") -> None:
        self.client, self.record, self.host = client, record, host
        self._claim = client.register_script((DATA / "claim.lua").read_text())
        self._put = client.register_script((DATA / "put.lua").read_text())

    def _keys(self, container_id: str, host: str) -> list[str]:
        return [f"{PREFIX}sb:{container_id}", EVENTS, f"{PREFIX}host:{host}:sandboxes", OLD_QUEUED]

    def beat(self, **facts: Any) -> None:
        self.record.heartbeat(self.host, {**WORDS["facts"], **facts})

    def claim(self, container_id: str) -> int:
        keys = self._keys(container_id, self.host)
        return int(self._claim(keys=keys, args=[container_id, self.host, 1, now(), 1000]))

    def put(self, container_id: str, state: str, host: str | None = None, **fields: str) -> int:
        host = self.host if host is None else host
        words = [json.dumps(WORDS["moves"]), json.dumps(WORDS["terminal"])]
        args = [container_id, state, now(), *words, 1, "", 3600, 1000, ""]
        flat = [part for pair in fields.items() for part in pair]
        return int(self._put(keys=self._keys(container_id, host), args=[*args, *flat]))

    def run(self, container_id: str) -> None:
        for state in ("launching", "running"):
            assert self.put(container_id, state, stage="ready", host=self.host) == 1

    def enqueue(self, container_id: str, spec: str = WORDS["spec"], batch: str = "b-old") -> None:
        """As its client; the message on the queue `launch` comes beside it."""
        raw = {"id": container_id, "batch": batch, "attempt": 1, "state": "queued", "created_at": now()}
        self.client.hset(f"{PREFIX}sb:{container_id}", mapping={**raw, "spec": spec})
        self.client.zadd(f"{PREFIX}sandboxes", {container_id: time.time()})
        self.client.zadd(OLD_QUEUED, {container_id: time.time()})
