"""kombu's Redis transport, of which a lost connection ends no worker, and whose channels keep their client.

Making a client was a ninth of what a worker's main process did in a launch: redis-py sets up its whole
configuration each time, and the pool of connections is the same.
"""

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis


class QoS(redis.QoS):
    """Kombu's, which ends the worker where a broker goes away while messages are not acknowledged.

    Celery closes such a connection twice; the first time without success, as nobody listens, and the second
    time without the transport that it needs to put the messages back.
    """

    def restore_unacked_once(self, stderr: Any = None) -> None:
        connection = self.channel.connection
        if connection is not None and connection.client is not None:
            super().restore_unacked_once(stderr=stderr)


class Channel(redis.Channel):
    """As kombu's."""

    QoS = QoS

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        create: Any = super()._create_client  # type: ignore[misc]  # the stubs do not have it
        if asynchronous:  # kombu itself keeps these
            return create(asynchronous=True)
        # The pool is another after a lost connection.
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = create()
        return self._kept


class Transport(redis.Transport):
    """As kombu's, with our channels."""

    Channel = Channel


def install() -> None:
    """Make it the transport of redis:// URLs in this process."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
