"""The host's end of conversations: a thread with an asyncio loop in a worker's main process.

None of them takes a slot of the pool. What a handler does is in `worker.follow` and `worker.exec`.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import redis
import redis.asyncio

from tasks import signing
from tasks.connection import connect_async
from tasks.wire import (
    CALLS_KEPT,
    CLIENT_SILENT_S,
    EXPIRE_S,
    PING_S,
    STALE_S,
    WINDOW_BYTES,
    Entry,
    Numbers,
    after,
    batches,
    call_key,
    calls_key,
    check_signed,
    life_key,
    read_call_fields,
    read_entry,
)
from worker import log_lines
from worker.calls import Call
from worker.errors import BadInput, HostAway, Lost, SandbatchError
from worker.settings import Settings

log = logging.getLogger("sandbatch")

MOST_CALLS = CALLS_KEPT
BLOCK_S = 5.0  # less than the connection's timeout; a new call, too, ends the wait
LAST_PAUSE_S = 2.0
STOP_S = 8.0  # for what runs in sandboxes to be ended, and clients to be told
AWAY = "away"  # an error that passes: a follower of a log asks again

RETRIED = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError, OSError)


class Conversation:
    """One call while it lives; a `worker.calls.Talk`."""

    def __init__(self, client: "redis.asyncio.Redis", call: Call) -> None:
        self.call, self.mark = call, b"0"
        self.in_key, self.out_key = call_key(call.call_id, "in"), call_key(call.call_id, "out")
        self.heard_at = self.sent_at = time.monotonic()
        self.reason: SandbatchError | None = None  # why it was cancelled
        self.task: asyncio.Task[None] | None = None
        self._client, self._numbers, self._number = client, Numbers(), 0
        self._sending = asyncio.Lock()
        self._sent = self._acked = self._taken = 0
        self._room = asyncio.Event()
        self._input: asyncio.Queue[bytes | None] = asyncio.Queue()

    # -- what a handler calls ----------------------------------------------------------------------

    async def output(self, stream: str, data: bytes, cursor: str = "") -> None:
        while self._sent - self._acked >= WINDOW_BYTES:
            self._room.clear()
            await self._room.wait()
        self._sent += len(data)
        await self.send(stream, data, cursor)

    async def note(self, words: str) -> None:
        await self.send("note", words.encode())

    async def input(self) -> bytes | None:
        return await self._input.get()

    async def took(self, count: int) -> None:
        self._taken += count
        await self.send("ack", str(self._taken).encode())

    # -- what the service calls --------------------------------------------------------------------

    async def send(self, kind: str, data: bytes = b"", cursor: str = "") -> None:
        """Add an entry; over a short outage of the broker it is tried again.

        Raises:
            Lost: The broker was away for too long.
        """
        async with self._sending:
            self._number += 1
            entry, pause_s = Entry(kind, self._number, data, cursor), 0.05
            deadline = time.monotonic() + CLIENT_SILENT_S
            while True:
                try:
                    pipe = self._client.pipeline(transaction=False)
                    pipe.xadd(self.out_key, entry.fields())
                    pipe.expire(self.out_key, EXPIRE_S)
                    await pipe.execute()
                    self.sent_at = time.monotonic()
                    break
                except RETRIED as error:
                    if time.monotonic() > deadline:
                        raise Lost("broker", f"away for too long ({error})", "try again") from None
                    await asyncio.sleep(pause_s)
                    pause_s = min(LAST_PAUSE_S, pause_s * 2)
        if self.reason is not None and kind != "error":
            raise asyncio.CancelledError  # redis-py may have lost the one that came meanwhile

    async def ping(self) -> None:
        """A sign of life, unless something is on its way already."""
        if not self._sending.locked():
            with contextlib.suppress(Lost, asyncio.CancelledError):
                await self.send("ping")

    def receive(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        """Take one entry of the client."""
        self.mark, self.heard_at = entry_id, time.monotonic()
        try:
            entry = read_entry(fields)
            if not self._numbers.is_new(entry):
                return
            if entry.kind == "ack":
                self._acked = min(self._sent, max(self._acked, int(entry.data)))
                self._room.set()
            elif entry.kind == "stdin":
                self._input.put_nowait(entry.data)
            elif entry.kind == "eof":
                self._input.put_nowait(None)
            elif entry.kind == "cancel":
                self.cancel(Lost("call", "its client has given it up"))
        except (Lost, ValueError) as error:
            self.cancel(error if isinstance(error, Lost) else Lost("call", "an ack is no number"))

    def cancel(self, reason: SandbatchError) -> None:
        if self.task is not None and self.reason is None:
            self.reason = reason
            self.task.cancel()


class Handlers(Protocol):
    """What the calls of a host do. Made in the loop in which it is used."""

    async def run(self, ready: asyncio.Event) -> None:
        """What goes on beside the calls; none is taken before `ready` is set."""

    async def handle(self, call: Any, talk: Conversation) -> dict[str, Any]:
        """Do what a call asks for; the answer is sent with the conversation's end."""


class CallService:
    """All conversations of one host."""

    def __init__(self, settings: Settings, make_handlers: Callable[[], Handlers]) -> None:
        self._settings, self._make_handlers = settings, make_handlers
        self._live: dict[str, Conversation] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="calls", daemon=True)
        self._stopping = asyncio.Event()
        self._mark = b"0"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all conversations, with what they run; clients are told."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(STOP_S + 2)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:  # the worker goes on; its clients are told by our silence
            log.exception("host %s: no logs and exec until its worker is started anew", self._settings.host)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _serve(self) -> None:
        self._handlers = self._make_handlers()
        self._client = connect_async(self._settings)
        ready = asyncio.Event()
        handlers = asyncio.create_task(self._handlers.run(ready))
        others = [asyncio.create_task(self._listen(ready)), asyncio.create_task(self._watch_over())]
        await self._stopping.wait()
        await self._end_all()
        for task in (*others, handlers):
            # More than once: redis-py may lose a cancellation that comes while it takes a connection.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.1)
        await self._client.aclose()

    async def _say_begun(self) -> None:
        """Clients of a worker that was killed need not wait for its silence."""
        key, pipe = life_key(self._settings.host), self._client.pipeline(transaction=True)
        pipe.xadd(key, {"t": "begun"}, maxlen=1, approximate=False)
        pipe.expire(key, EXPIRE_S)
        try:
            await pipe.execute()
        except RETRIED as error:
            log.warning("calls of host %s: the broker is away: %s", self._settings.host, error)

    async def _end_all(self) -> None:
        tasks = [one.task for one in self._live.values() if one.task is not None]
        for conversation in list(self._live.values()):
            host = self._settings.host
            conversation.cancel(HostAway(f"host {host}", "its worker stops", "ask again when it is back"))
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)

    async def _listen(self, ready: asyncio.Event) -> None:
        """Wait for new calls and for what clients say, all in one; over outages of the broker, too."""
        await ready.wait()
        await self._say_begun()
        pause_s, key = 0.05, calls_key(self._settings.host).encode()
        while not self._stopping.is_set():
            streams: dict[Any, Any] = {one.in_key: one.mark for one in self._live.values()}
            try:
                streams[key] = self._mark
                found = await self._client.xread(streams, count=64, block=int(BLOCK_S * 1000))
                for name, entries in batches(found):
                    if name != key:
                        await self._hear(name, entries)
                        continue
                    for entry_id, fields in entries:
                        await self._take(entry_id, fields)
                        self._mark = entry_id
                pause_s = 0.05
            except (redis.RedisError, OSError) as error:
                if pause_s == LAST_PAUSE_S:
                    log.warning("calls of host %s wait for the broker: %s", self._settings.host, error)
                await asyncio.sleep(pause_s)
                pause_s = min(LAST_PAUSE_S, pause_s * 2)
                for one in self._live.values():
                    one.heard_at = time.monotonic()  # nobody could be heard

    async def _hear(self, name: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        conversation = self._live.get(name.decode())
        if conversation is None or not entries:
            return  # it has just ended
        for entry_id, fields in entries:
            conversation.receive(entry_id, fields)
        await self._client.xtrim(conversation.in_key, minid=after(conversation.mark), approximate=False)

    async def _take(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        """Begin a call, if it is still wanted. It is taken out of the stream first: none is begun twice."""
        key = calls_key(self._settings.host)
        try:
            call = read_call_fields(fields)
        except BadInput as error:
            log.warning("host %s refuses a call: %s", self._settings.host, error)
            await self._client.xdel(key, entry_id)
            return
        pipe = self._client.pipeline(transaction=True)
        pipe.xdel(key, entry_id)
        pipe.time()
        pipe.xrange(call_key(call.call_id, "in"), count=10)
        taken, (now_s, _), said = await pipe.execute()
        age_s = now_s - int(entry_id.partition(b"-")[0]) / 1000
        given_up = not said or any(fields.get(b"t") == b"cancel" for _, fields in said)
        if not taken or age_s > STALE_S or given_up:
            return
        conversation = Conversation(self._client, call)
        self._live[conversation.in_key] = conversation
        refusal = self._refusal(fields)
        conversation.task = asyncio.create_task(self._converse(conversation, refusal))
        await asyncio.sleep(0)  # one that is cancelled before it has begun would tell nobody

    def _refusal(self, fields: dict[bytes, bytes]) -> SandbatchError | None:
        """Why a call is not for this host to answer: it is not signed by somebody whom it listens to."""
        trust = signing.trust(self._settings)
        if trust is None:
            return None
        try:
            signed = check_signed(fields, self._settings.host, trust, self._settings.message_age_s)
            if not signing.seen(self._settings).add(signed.nonce, signed.at):
                raise signing.Refused("call", "this host has taken it before", "is it a replay?")
        except signing.Refused as error:
            log.error("host %s refuses a call: %s; %s", self._settings.host, error.why, error.todo)
            return error
        return None

    async def _converse(self, one: Conversation, refusal: SandbatchError | None) -> None:
        error: SandbatchError | None = None
        call = one.call
        whom = {"sandbox": getattr(call, "container_id", None), "env": getattr(call, "env", None)}
        log_lines.now_about(stage=call.verb, **whom)  # of this asyncio task alone
        try:
            if refusal is not None:
                raise refusal
            if len(self._live) > MOST_CALLS:
                raise SandbatchError(f"host {self._settings.host}", "too many calls at a time", "try later")
            await one.send("begin")
            answer = await self._handlers.handle(one.call, one)
            await one.send("end", json.dumps(answer).encode())
        except asyncio.CancelledError:
            error = one.reason
        except Lost as lost:
            log.warning("call is lost: %s", lost)
        except SandbatchError as refused:
            error = refused
        except Exception as defect:  # one call must not end the others, and its client must know
            log.exception("call failed by a defect")
            words = f"{type(defect).__name__}: {defect}"
            error = SandbatchError(f"host {self._settings.host}", words, "see the worker's log")
        finally:
            self._live.pop(one.in_key, None)
        if error is not None:
            with contextlib.suppress(Lost, TimeoutError, redis.RedisError):
                async with asyncio.timeout(PING_S):
                    await one.send("error", json.dumps(_document(error)).encode())

    async def _watch_over(self) -> None:
        """Signs of life to the clients, and an end to the calls of those that give none."""
        while True:
            await asyncio.sleep(PING_S / 2)
            now = time.monotonic()
            for one in list(self._live.values()):
                if one.reason is not None and one.task is not None:
                    one.task.cancel()  # again: see `_serve`
                elif now - one.heard_at > CLIENT_SILENT_S:
                    one.cancel(Lost("call", "its client is silent"))
                elif now - one.sent_at >= PING_S / 2:
                    self._pings = asyncio.create_task(one.ping())


def _document(error: SandbatchError) -> dict[str, Any]:
    code = AWAY if isinstance(error, HostAway) else "bad" if isinstance(error, BadInput) else ""
    return {"what": error.what, "why": error.why, "todo": error.todo, "code": code}
