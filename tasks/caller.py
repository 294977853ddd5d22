"""A client's end of one conversation with a host; see `tasks.wire`."""

import secrets
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import redis

from tasks import signing
from tasks.connection import connect_raw
from tasks.wire import (
    ACK_BYTES,
    CALLS_KEPT,
    EXPIRE_S,
    HOST_SILENT_S,
    PING_S,
    STALE_S,
    WINDOW_BYTES,
    Entry,
    Numbers,
    after,
    batches,
    call_fields,
    call_key,
    calls_key,
    life_key,
    read_entry,
)
from worker.calls import Call
from worker.errors import BadInput, HostAway, Lost, Refused, SandbatchError
from worker.settings import Settings

BLOCK_S = 2.0  # less than the connection's timeout
RETRIED = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError, OSError)


def new_call_id() -> str:
    return secrets.token_hex(16)


class Conversation:
    """One call, from its `with` to its end. A thread gives signs of life: whoever reads what comes may
    be slow, such as a pager; its host then waits, and nothing piles up."""

    def __init__(self, settings: Settings, host: str, call: Call) -> None:
        self._host, self._call, self._signer = host, call, signing.signer(settings)
        self._in_key, self._out_key = call_key(call.call_id, "in"), call_key(call.call_id, "out")
        # A connection for each thread: one that waits in XREAD sends nothing.
        self._reader, self._writer = connect_raw(settings), connect_raw(settings)
        self._sending, self._numbers, self._number = threading.Lock(), Numbers(), 0
        self._over = threading.Event()
        self._pinger = threading.Thread(target=self._ping, name="pings", daemon=True)
        self._sent = self._acked = self._received = self._said = 0
        self._room = threading.Condition()
        self._life_mark, self._is_of_a_dead_worker = b"0", False

    def __enter__(self) -> "Conversation":
        begun: Any = self._writer.xrevrange(life_key(self._host), count=1)
        self._life_mark = begun[0][0] if begun else b"0"
        self._send("ping")  # its `in` stream is the sign that somebody waits
        pipe = self._writer.pipeline(transaction=True)
        fields = call_fields(self._call, self._host, self._signer)
        pipe.xadd(calls_key(self._host), fields, maxlen=CALLS_KEPT)
        pipe.expire(calls_key(self._host), EXPIRE_S)
        pipe.execute()
        self._pinger.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with self._room:
            self._room.notify_all()
        self._pinger.join(PING_S)
        try:
            if kind is None or issubclass(kind, (BadInput, Refused)):
                self._writer.delete(self._in_key, self._out_key)
            else:
                self._send("cancel")
        except (redis.RedisError, OSError, Lost):
            pass  # the host misses our signs of life, and the keys expire
        self._reader.close()
        self._writer.close()

    def replies(self) -> Iterator[Entry]:
        """What the host sends: stdout, stderr, note, and an `end` as the last.

        Raises:
            HostAway: It is silent, or says that it stops.
            Refused: The host's error.
            Lost: The broker is away, or has lost a part.
        """
        mark, heard_at, has_begun = b"0", time.monotonic(), False
        while True:
            entries, is_broker_up = self._read(mark, has_begun)
            if self._is_of_a_dead_worker and has_begun and not entries:
                raise HostAway(f"host {self._host}", "its worker was started anew", "see sandbatch show")
            for entry_id, fields in entries:
                mark, heard_at = entry_id, time.monotonic()
                entry = read_entry(fields)
                if not self._numbers.is_new(entry):
                    continue
                has_begun = True
                if entry.kind in ("stdout", "stderr", "note"):
                    yield entry
                    self._note_received(entry, entry_id)
                    heard_at = time.monotonic()  # writing it may have taken long
                elif entry.kind == "ack":
                    with self._room:
                        self._acked = max(self._acked, int(entry.data))
                        self._room.notify_all()
                elif entry.kind == "error":
                    raise _error_in(entry.document())
                elif entry.kind == "end":
                    yield entry
                    return
            silent_s = time.monotonic() - heard_at
            if silent_s > (HOST_SILENT_S if has_begun else STALE_S):
                if not is_broker_up:
                    raise Lost("broker", "it has been away for too long", "check that it runs, and try again")
                words = "it has gone silent" if has_begun else "it does not answer"
                raise HostAway(f"host {self._host}", words, "see sandbatch hosts, and its worker's log")

    def feed(self, data: bytes) -> bool:
        """Send input, empty for its end; waits while the host is behind. False once the call is over."""
        with self._room:
            while self._sent - self._acked >= WINDOW_BYTES and not self._over.is_set():
                self._room.wait()
        if self._over.is_set():
            return False
        self._sent += len(data)
        self._send("stdin" if data else "eof", data)
        return True

    def _read(self, mark: bytes, has_begun: bool) -> tuple[list[tuple[bytes, dict[bytes, bytes]]], bool]:
        """The entries behind `mark`, and whether the broker answered."""
        try:
            streams: dict[Any, Any] = {self._out_key: mark, life_key(self._host): self._life_mark}
            answer: Any = self._reader.xread(streams, count=64, block=int(BLOCK_S * 1000))
        except RETRIED:
            time.sleep(0.2)
            return [], False
        found = []
        for name, entries in batches(answer):
            if name == self._out_key.encode():
                found += entries
            elif entries:  # heard before the call has begun, the new worker may take it yet
                self._life_mark = entries[-1][0]
                self._is_of_a_dead_worker = has_begun
        return found, True

    def _note_received(self, entry: Entry, entry_id: bytes) -> None:
        """Let the host go on, and the broker forget."""
        self._received += len(entry.data) if entry.kind != "note" else 0
        if self._received - self._said >= ACK_BYTES:
            self._said = self._received
            self._send("ack", str(self._received).encode())
            try:
                self._writer.xtrim(self._out_key, minid=after(entry_id), approximate=False)
            except RETRIED:
                pass  # the next one trims this part, too

    def _ping(self) -> None:
        while not self._over.wait(PING_S):
            try:
                self._send("ping")
            except (redis.RedisError, Lost):
                return  # the main thread finds out as well, and says so

    def _send(self, kind: str, data: bytes = b"") -> None:
        """Add an entry; over a short outage of the broker it is tried again."""
        with self._sending:
            self._number += 1
            fields, deadline = Entry(kind, self._number, data).fields(), time.monotonic() + HOST_SILENT_S
            while True:
                try:
                    pipe = self._writer.pipeline(transaction=False)
                    pipe.xadd(self._in_key, fields)
                    pipe.expire(self._in_key, EXPIRE_S)
                    pipe.execute()
                    return
                except RETRIED:
                    if time.monotonic() > deadline or kind == "cancel":
                        why = "it has been away for too long"
                        raise Lost("broker", why, "check that it runs, and try again") from None
                    time.sleep(0.2)


def _error_in(document: dict[str, Any]) -> SandbatchError:
    """The host's error, as it has sent it."""
    kinds: dict[str, type[SandbatchError]] = {"away": HostAway, "bad": BadInput}
    what, why, todo = (str(document.get(name, "")) for name in ("what", "why", "todo"))
    return kinds.get(str(document.get("code")), Refused)(what, why, todo)
