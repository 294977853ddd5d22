"""What is our own of the way of a message."""

from tasks.app import make_app
from tasks.submit import publish_place
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


def test_a_connection_that_celery_closes_a_second_time_ends_no_worker(broker: Settings, client, sender):
    """The first time it could not put back what is not acknowledged, as the broker was away."""
    publish_place(sender, [("sb-00000000000000a1", 1, broker.host)])
    with make_app(broker, broker.host).connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.basic_get(f"host.{broker.host}") is not None
        connection._do_close_transport()
        channel.close()
    assert client.zcard(f"sandbatch:mq:unacked_index.{broker.host}") == 1, "the next connection takes it back"
