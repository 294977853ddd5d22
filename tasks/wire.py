"""How a client and a host speak through the broker: key names, entries, and the limits of both sides.

A client adds a call to its host's stream; the two then have one stream each way, which the reader
trims and which expires by itself. Every entry has a number, so that what was sent twice over a
broken connection is taken once, and what the broker has lost is noticed.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from tasks.keys import PREFIX
from tasks.signing import Signed, Signer, Trust
from worker.calls import Call, read_call
from worker.errors import Lost

WINDOW_BYTES = 1 << 20  # sent and not yet acknowledged: more never lies in the broker
ACK_BYTES = WINDOW_BYTES // 4
PING_S = 5.0
HOST_SILENT_S = 15.0  # then the client gives the host up
CLIENT_SILENT_S = 20.0  # then the host ends the call
STALE_S = 10.0  # a call that no host has taken by then is given up by its client
EXPIRE_S = 60  # of every key; renewed while alive
CALLS_KEPT = 1000

Side = Literal["in", "out"]  # as the host sees it
Fields = dict[bytes, bytes]


def call_key(call_id: str, side: Side) -> str:
    """The stream of one call's entries in one direction."""
    return f"{PREFIX}call:{call_id}:{side}"


def calls_key(host: str) -> str:
    """The stream of calls that wait for a host."""
    return f"{PREFIX}host:{host}:calls"


def life_key(host: str) -> str:
    """The stream in which a host's worker says that it has begun: what went before has died."""
    return f"{PREFIX}host:{host}:calls:begun"


@dataclass(frozen=True)
class Entry:
    """One entry of a conversation. To the host: stdin, eof, ack, ping, cancel. To the client: begin,
    stdout, stderr, note, ack, ping, end, error."""

    kind: str
    number: int
    data: bytes = b""
    cursor: str = ""

    def fields(self) -> dict[Any, Any]:  # redis-py's types want it so wide
        made: dict[Any, Any] = {"t": self.kind, "n": self.number}
        if self.data:
            made["d"] = self.data
        if self.cursor:
            made["c"] = self.cursor
        return made

    def document(self) -> dict[str, Any]:
        found = json.loads(self.data or b"{}")
        return found if isinstance(found, dict) else {}


class Numbers:
    """Of the entries that arrive: each is taken once, and none is missing."""

    def __init__(self) -> None:
        self._last = 0

    def is_new(self, entry: Entry) -> bool:
        """Whether it is the next one; False for one that was taken already.

        Raises:
            Lost: Entries before it are missing.
        """
        if entry.number > self._last + 1:
            raise Lost("call", "the broker has lost a part of the conversation", "try again")
        if entry.number <= self._last:
            return False
        self._last = entry.number
        return True


def read_entry(fields: Fields) -> Entry:
    """An entry as it came out of a stream.

    Raises:
        Lost: It is none.
    """
    try:
        cursor = fields.get(b"c", b"").decode()
        return Entry(fields[b"t"].decode(), int(fields[b"n"]), fields.get(b"d", b""), cursor)
    except (KeyError, ValueError):
        raise Lost("call", "the other side sent what is no entry", "is it of another release?") from None


def call_fields(call: Call, host: str, signer: Signer | None = None) -> dict[Any, Any]:
    """A call as it is added to its host's stream."""
    text = call.model_dump_json()
    return {"call": text, "token": signer.sign("call", [host, text])} if signer else {"call": text}


def check_signed(fields: Fields, host: str, trust: Trust, max_age_s: float) -> Signed:
    """See who makes a call.

    Raises:
        tasks.signing.Refused: Nobody whom the host listens to.
    """
    token = fields.get(b"token", b"").decode(errors="replace")
    return trust.verify("call", [host, fields.get(b"call", b"")], token, max_age_s=max_age_s)


def read_call_fields(fields: Fields) -> Call:
    """Check what stands in a host's stream; whoever has the broker's password can write there.

    Raises:
        BadInput: It is no call.
    """
    return read_call(fields.get(b"call", b""))


def batches(answer: Any) -> list[tuple[bytes, list[tuple[bytes, Fields]]]]:
    """What XREAD answers, as pairs of a stream and its entries, by either protocol of Redis."""
    if isinstance(answer, dict):
        return [(name, lists[0]) for name, lists in answer.items() if lists]
    return [(name, entries) for name, entries in answer or []]


def after(entry_id: bytes) -> str:
    """The least id behind this one: all before it may be trimmed."""
    milliseconds, _, number = entry_id.decode().partition("-")
    return f"{milliseconds}-{int(number) + 1}"
