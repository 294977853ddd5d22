"""Pulls in the record: which digest a batch runs, what hosts pull now, and the orders of `sandbatch pull`.

A pin is the digest to which a batch's reference was resolved, by whichever of its hosts was first. It lives
as long as the batch's own keys. Orders are wishes: they stay until their host has carried them out, and what
became of them can be read for an hour after.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import redis

from tasks.keys import CHUNK, HOSTS, PREFIX, PULLS_KEPT_S, TERMINAL_KEPT_S, host_key
from tasks.pull_scripts import ADMIT, PIN, PINNED, TELL
from tasks.signing import Signer, Trust
from worker.journal import now

ENDED = frozenset({"done", "failed"})  # states of an order; before: waiting, pulling
ORDER_LIVES_S = 24 * 3600  # of one that no host carries out
ENDED_KEPT_S = 3600
NOTES_KEPT = 20  # of one order's stream

Row = dict[str, Any]


class Pulls:
    """Pins, progress and orders, behind one connection."""

    def __init__(self, client: "redis.Redis") -> None:
        self.client = client
        self._pin = client.register_script(PIN)
        self._pinned = client.register_script(PINNED)
        self._admit = client.register_script(ADMIT)
        self._tell = client.register_script(TELL)

    # -- pins ----------------------------------------------------------------------------------------

    def pinned(self, batch: str, reference: str) -> str | None:
        """The digest that a batch runs for a reference; None while no host has resolved it."""
        return cast("str | None", self._pinned(keys=[], args=[batch, reference]))

    def pin(self, batch: str, reference: str, digest: str) -> str:
        """Pin a digest for a batch; the one that counts is returned, which may be another host's."""
        args: list[str | float] = [batch, reference, digest, TERMINAL_KEPT_S]
        return str(self._pin(keys=[], args=args))

    # -- launches that wait for an image -------------------------------------------------------------

    def admit(self, host: str, ids: Sequence[str], lost_s: float) -> None:
        """Line up launches whose image is here now; the host's puller takes them as it has slots.

        Safe to repeat. One that was taken from this line `lost_s` ago, and still asks, has lost its message:
        it is lined up again.
        """
        for start in range(0, len(ids), CHUNK):
            args: list[str | float] = [host, time.time(), lost_s, *ids[start : start + CHUNK]]
            self._admit(keys=[], args=args)

    # -- what is pulled now --------------------------------------------------------------------------

    def show_pulls(self, host: str, rows: Sequence[Row]) -> None:
        """Replace what a host says of its pulls; it is gone some seconds after the host's last word."""
        key = host_key(host) + ":pulls"
        pipe = self.client.pipeline()
        pipe.delete(key)
        if rows:
            pipe.hset(key, mapping={str(number): json.dumps(row) for number, row in enumerate(rows)})
            pipe.expire(key, PULLS_KEPT_S)
        pipe.execute()

    def pulls_on(self, host: str) -> list[Row]:
        """What a host pulls now, oldest first.

        Each row: `reference`, `digest` (None while it is resolved), `phase` (resolving, pulling, unpacking or
        waiting), `done_bytes`, `total_bytes` (None: not known), `tries`, `words` (why it is tried again, or
        ""), `batches`, `waiters` (sandboxes that wait for it), `orders`, `since` (RFC 3339).
        """
        found = cast("dict[str, str]", self.client.hgetall(host_key(host) + ":pulls"))
        return sorted((json.loads(row) for row in found.values()), key=lambda row: str(row["since"]))

    def all_pulls(self) -> dict[str, list[Row]]:
        """What each host pulls now, by its name; hosts that pull nothing are left out."""
        names = sorted(cast("set[str]", self.client.smembers(HOSTS)))
        found = {name: self.pulls_on(name) for name in names}
        return {name: rows for name, rows in found.items() if rows}

    def pull_for(self, sandbox: Mapping[str, Any]) -> Row | None:
        """The pull that a sandbox (in the shape of `Record.get`) waits for; None if it waits for none."""
        reference = (sandbox.get("spec") or {}).get("image")
        if not reference or not sandbox.get("host") or sandbox.get("stage") != "image":
            return None
        for row in self.pulls_on(sandbox["host"]):
            if sandbox["batch"] in row["batches"] and row["reference"] == reference:
                return row
        return None

    # -- orders --------------------------------------------------------------------------------------

    def write_order(self, host: str, reference: str, policy: str, signer: Signer | None = None) -> str:
        """Note the wish that a host has an image; its id. `tasks.submit.order_pull` tells the host."""
        pull_id = "pull-" + secrets.token_hex(8)
        fields = {"id": pull_id, "host": host, "reference": reference, "policy": policy}
        if signer is not None:
            fields["token"] = signer.sign("pull", [host, pull_id, reference, policy])
        fields |= {"state": "waiting", "asked_at": now()}
        pipe = self.client.pipeline()
        pipe.hset(_order_key(pull_id), mapping=dict[Any, Any](fields))
        pipe.expire(_order_key(pull_id), ORDER_LIVES_S)
        pipe.sadd(host_key(host) + ":orders", pull_id)
        pipe.execute()
        return pull_id

    def order(self, pull_id: str) -> Row | None:
        """One order, None if there is none (any more).

        `id`, `host`, `reference`, `policy`, `state` (waiting, pulling, done, failed), `phase`, `done_bytes`,
        `total_bytes`, `tries`, `words`, `digest`, `error` (words, of a failed one), `asked_at`, `ended_at`.
        """
        raw = cast("dict[str, str]", self.client.hgetall(_order_key(pull_id)))
        return _shape(raw) if raw.get("id") else None

    def check_order(self, row: Row, trust: Trust) -> None:
        """See who has written an order.

        Raises:
            tasks.signing.Refused: Nobody whom the host listens to.
        """
        token = self.client.hget(_order_key(row["id"]), "token")
        parts = [row["host"], row["id"], row["reference"], row["policy"]]
        trust.verify("pull", parts, token, max_age_s=ORDER_LIVES_S)

    def orders_on(self, host: str) -> list[Row]:
        """The orders that a host has not carried out."""
        key, found = host_key(host) + ":orders", []
        for pull_id in sorted(cast("set[str]", self.client.smembers(key))):
            row = self.order(pull_id)
            if row is None or row["state"] in ENDED:
                self.client.srem(key, pull_id)
            else:
                found.append(row)
        return found

    def tell_order(self, pull_id: str, **fields: str | int | None) -> None:
        """Note how an order goes on, and wake whoever waits for it; one that has ended stays as it is.

        With `state` done or failed it has ended.
        """
        said = {name: str(value) for name, value in fields.items() if value is not None}
        if said.get("state") in ENDED:
            said["ended_at"] = now()
        expiry = ENDED_KEPT_S if said.get("state") in ENDED else ORDER_LIVES_S
        flat = [part for pair in said.items() for part in pair]
        self._tell(keys=[], args=[pull_id, expiry, NOTES_KEPT, *flat])

    def follow_orders(self, ids: Sequence[str], block_s: float = 5.0) -> Iterator[list[Row]]:
        """The orders as they change, until all have ended (or expired).

        First all of them, then those that have changed; an empty list after each `block_s` without news, so
        that the caller can look at its own deadline, or at whether the hosts live.
        """
        marks: dict[str, str] = {_notes_key(one): "0-0" for one in ids}
        rows = [row for row in map(self.order, ids) if row is not None]
        marks = {_notes_key(row["id"]): "0-0" for row in rows if row["state"] not in ENDED}
        yield rows
        while marks:
            answer = cast(
                "list[tuple[str, list[Any]]]",
                self.client.xread(cast("dict[Any, Any]", marks), block=max(1, int(block_s * 1000))) or [],
            )
            changed = []
            for key, notes in answer:
                marks[key] = notes[-1][0]
                row = self.order(key.removesuffix(":notes").removeprefix(PREFIX + "pull:"))
                if row is None or row["state"] in ENDED:
                    del marks[key]
                if row is not None:
                    changed.append(row)
            if not answer:
                for key in [one for one in marks if not self._is_there(one)]:
                    del marks[key]
            yield changed

    def _is_there(self, notes_key: str) -> bool:
        return bool(self.client.exists(notes_key.removesuffix(":notes")))


def _order_key(pull_id: str) -> str:
    return f"{PREFIX}pull:{pull_id}"


def _notes_key(pull_id: str) -> str:
    return f"{_order_key(pull_id)}:notes"


def _shape(raw: Mapping[str, str]) -> Row:
    texts = ("id", "host", "reference", "policy", "state", "asked_at")
    row: Row = {name: raw.get(name, "") for name in texts}
    for name in ("phase", "digest", "error", "ended_at"):
        row[name] = raw.get(name) or None
    for name in ("done_bytes", "total_bytes"):
        row[name] = int(raw[name]) if raw.get(name) else None
    return {**row, "tries": int(raw.get("tries") or 0), "words": raw.get("words", "")}
