"""A Celery message as it lies in its queue: signed where it is put there, checked where it is taken out.

Signed is all that says what is to be done, and where: the queue, the headers with the task's name and its
id, the body with the arguments and whatever Celery would publish after it. Not signed is what the transport
changes itself when it hands a message back: that it was delivered before.

At least once is what Celery promises, so a message that comes again is no replay yet: it is one once this
host has acknowledged it.
"""

import base64
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from kombu.utils import json as wire_json

from tasks import signing
from tasks.signing import TOKEN, Refused, Signed, Trust
from worker.settings import Settings

log = logging.getLogger("sandbatch")

TOKEN_HEADER = "sandbatch"  # noqa: S105 - its name
CHANGED_HEADERS = frozenset({TOKEN_HEADER, "redelivered"})
CONTROL_QUEUE = ".celery.pidbox"  # of Celery's remote control, which can only be asked (tasks.consumer)
# What one may send to a host that is not oneself. The other tasks are stages and undos, which a host has its
# own journal for: it alone sends them.
FOR_ALL = frozenset({"sandbatch.place", "sandbatch.unwind", "sandbatch.stop", "sandbatch.pull"})
TOLD, TOLD_PERIOD_S = 10, 60.0  # so many refusals are logged in a period; the next line counts the rest

Message = dict[str, Any]


class Guard:
    """What one process signs and takes; made for one Celery app."""

    def __init__(self, settings: Settings) -> None:
        self._signer, self._trust = signing.signer(settings), signing.trust(settings)
        self._age_s = settings.message_age_s
        self._seen = signing.seen(settings) if self._trust else None
        self._told, self._told_since, self._untold = 0, 0.0, 0

    def sign(self, queue: str, message: Message) -> Message:
        """The message with our token, if it is a task's and we have a key."""
        headers = message.get("headers") or {}
        if self._signer is None or not headers.get("task"):
            return message
        token = self._signer.sign("message", _parts(queue, message))
        return {**message, "headers": {**headers, TOKEN_HEADER: token}}

    def admits(self, queue: str, message: Message) -> bool:
        """Whether a host may work on it; what it may not is dropped, and told.

        Nothing is lost by that: the record and the journals say what is due, and what was true is sent again.
        """
        if self._trust is None or queue.endswith(CONTROL_QUEUE):
            return True
        try:
            self._check(self._trust, queue, message)
        except Refused as error:
            self._tell(queue, message, error)
            return False
        return True

    def _check(self, trust: Trust, queue: str, message: Message) -> None:
        token = message["headers"].get(TOKEN_HEADER)
        try:
            parts = _parts(queue, message)
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(
                "message", f"it cannot be read ({error})", "is its sender of another release?"
            ) from None
        signed = trust.verify("message", parts, token, max_age_s=self._age_s)
        if self._seen is not None and signed.nonce in self._seen:
            raise Refused("message", "this host has done with it before", "is it a replay?")
        if not (signed.role == "host" and queue == f"host.{signed.name}"):
            _check_is_for_all(signed, message)

    def note_done(self, headers: Mapping[str, Any] | None) -> None:
        """A message was acknowledged: it must not come again."""
        token = (headers or {}).get(TOKEN_HEADER)
        found = TOKEN.fullmatch(token) if isinstance(token, str) else None
        if self._seen is None or found is None:
            return
        try:
            self._seen.add(found["nonce"], float(found["at"]))
        except OSError as error:  # its order is one of an attempt, and does nothing twice
            log.error("a message could be replayed for %.0f s: %s", self._age_s, error)

    def _tell(self, queue: str, message: Message, error: Refused) -> None:
        """One line; not one for each of thousands that a stranger may send."""
        moment = time.monotonic()
        if moment - self._told_since > TOLD_PERIOD_S:
            self._told, self._told_since = 0, moment
        if self._told >= TOLD:
            self._untold += 1
            return
        self._told += 1
        task = str(message["headers"].get("task"))[:80]
        more = f" (and {self._untold} others before)" if self._untold else ""
        self._untold = 0
        log.error("message %r in queue %s is refused: %s; %s%s", task, queue, error.why, error.todo, more)


def _check_is_for_all(signed: Signed, message: Message) -> None:
    task = str(message["headers"].get("task"))
    if task not in FOR_ALL:
        raise Refused(
            "message", f"{signed.by} may not send {task[:80]} to this host", "only the host itself may"
        )
    try:
        _, _, embedded = json.loads(_body(message))
        follows = [name for name, value in embedded.items() if value]
    except (ValueError, TypeError, AttributeError):
        raise Refused("message", f"its body, of {signed.by}, is none of Celery's", "send it again") from None
    if follows:  # what Celery would publish, and we would sign, after the task
        why = f"{signed.by} may not have tasks follow on one ({', '.join(map(str, follows))[:80]})"
        raise Refused("message", why, "only the host itself may")


def _parts(queue: str, message: Message) -> list[str]:
    properties = message.get("properties") or {}
    where = properties.get("delivery_info") or {}
    headers = {name: value for name, value in message["headers"].items() if name not in CHANGED_HEADERS}
    words = [message.get("content-type"), message.get("content-encoding"), properties.get("body_encoding")]
    words += [where.get("exchange"), where.get("routing_key"), message.get("body")]
    # As they come out of the queue: JSON has no tuples, and no times.
    said = wire_json.loads(wire_json.dumps(headers))
    return [queue, json.dumps(said, sort_keys=True, default=str), *(str(word) for word in words)]


def _body(message: Message) -> bytes:
    if (message.get("properties") or {}).get("body_encoding") == "base64":
        return base64.b64decode(message["body"])
    return str(message["body"]).encode()
