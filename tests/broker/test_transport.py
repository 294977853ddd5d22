"""What is our own of the way of a message."""

from tasks.app import make_app
from worker.settings import Settings


def test_a_channel_keeps_its_client_until_its_connections_are_new(broker: Settings, client) -> None:
    """kombu makes one for each publish and each acknowledgement: a ninth of a worker's main process."""
    with make_app(broker, "client").connection_for_write() as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as one, channel.conn_or_acquire() as other:
            assert one is other
        channel._put("host.h1", {"properties": {"delivery_info": {"priority": 0}}})
        assert channel._size("host.h1") == 1

        channel._disconnect_pools()  # as after a lost connection

        with channel.conn_or_acquire() as new:
            assert new is not one
            assert new.connection_pool is channel.pool
        assert channel._size("host.h1") == 1
