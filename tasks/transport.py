"""kombu's Redis transport: no lost connection or broken message ends a worker; messages are signed.

Channels keep their client: making one was a ninth of what a worker's main process did in a launch, since
redis-py sets up its whole configuration each time, and the pool of connections is the same.
"""

import base64
import json
import logging
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis

from tasks.envelope import Guard

log = logging.getLogger("sandbatch")
SHOWN = 200  # characters of what is no message
# Of a text that is none of kombu's: no JSON, a number of thousands of digits, lists in lists, a value that
# its `__type__` cannot have.
NO_MESSAGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class QoS(redis.QoS):
    """Kombu's, which ends the worker where a broker goes away while messages are not acknowledged.

    Celery closes such a connection twice; the first time without success, as nobody listens, and the second
    time without the transport that it needs to put the messages back.
    """

    def restore_unacked_once(self, stderr: Any = None) -> None:
        connection = self.channel.connection
        if connection is not None and connection.client is not None:
            super().restore_unacked_once(stderr=stderr)

    def ack(self, delivery_tag: str) -> None:
        self._note_done(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self._note_done(delivery_tag)
        super().reject(delivery_tag, requeue=requeue)

    def _note_done(self, delivery_tag: str) -> None:
        channel: Any = self.channel
        message = self._delivered.get(delivery_tag) if self._delivered else None
        if channel.guard is not None and message is not None:
            channel.guard.note_done(message.headers)


class Channel(redis.Channel):
    """As kombu's."""

    QoS = QoS

    guard: Guard | None = None
    from_transport_options = (*redis.Channel.from_transport_options, "guard")

    _kept: Any = None

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[misc]
        return {**found, "driver_info": None}  # as `tasks.connection`

    def _create_client(self, asynchronous: bool = False) -> Any:
        create: Any = super()._create_client  # type: ignore[misc]  # the stubs do not have it
        if asynchronous:  # kombu itself keeps these
            return create(asynchronous=True)
        # The pool is another after a lost connection.
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = create()
        return self._kept

    def _put(self, queue: str, message: Any, **more: Any) -> None:
        put: Any = super()._put
        put(queue, self.guard.sign(queue, message) if self.guard else message, **more)

    def _brpop_read(self, **options: Any) -> Any:
        """Take what has come; kombu's ends the worker where somebody has put text into the queue by hand."""
        read: Any = super()._brpop_read  # type: ignore[misc]  # the stubs do not have it
        transport: Any = self.connection
        before = transport.delivered
        try:
            return read(**options)
        except NO_MESSAGE as error:
            if transport.delivered != before:
                raise  # it was one, and something else went wrong
            text = getattr(error, "doc", None) or getattr(error, "object", "")
            why = "it is no JSON" if text else f"it cannot be read ({type(error).__name__}: {error})"
            _tell_dropped(why, str(text))
            return True


class Transport(redis.Transport):
    """As kombu's, with our channels."""

    Channel = Channel

    delivered = 0  # texts of queues that could be read

    def _deliver(self, message: Any, queue: str | None) -> None:
        self.delivered += 1
        if why := _broken(message):
            _tell_dropped(why, _text(message))
        elif self._admits(str(queue), message):
            super()._deliver(message, queue)

    def _admits(self, queue: str, message: Any) -> bool:
        connection: Any = self.client
        guard: Guard | None = connection.transport_options.get("guard")
        return guard is None or guard.admits(queue, message)


def _broken(message: Any) -> str:
    """Why kombu could not even hand it back; empty for a message, readable for Celery or not."""
    if not isinstance(message, dict):
        return "it is no JSON object"
    properties = message.get("properties")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        return "it has no delivery tag"
    where = properties.get("delivery_info")
    if not isinstance(where, dict) or not {"exchange", "routing_key"} <= set(where):
        return "it does not say where it was sent to"
    if not isinstance(message.get("body"), str) or not isinstance(message.get("headers"), dict):
        return "it has no body or no headers"
    encoding = properties.get("body_encoding")
    try:
        if encoding == "base64":
            base64.b64decode(message["body"])
    except ValueError as error:
        return f"its body cannot be decoded ({error})"
    if not isinstance(message["headers"].get("task", ""), str):
        return "its task's name is no text"
    return "" if encoding in (None, "base64") else "its body has an unknown encoding"


def _text(message: Any) -> str:
    """What kombu's types are made of needs not be JSON."""
    try:
        return json.dumps(message, default=str)
    except (ValueError, TypeError, RecursionError):
        return f"a {type(message).__name__}"


def _tell_dropped(why: str, text: str) -> None:
    """It cannot be put aside as those of other releases are: nobody could ever read it."""
    log.error("a queue held what is no message of Celery: %s; it is dropped: %.*s", why, SHOWN, text)


def install() -> None:
    """Make it the transport of redis:// URLs in this process."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
