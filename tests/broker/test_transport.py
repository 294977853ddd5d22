"""What is our own of the way of a message."""

import json
from typing import Any

import pytest
from kombu import Consumer, Queue

from tasks.app import host_queue, make_app
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


TO_HERE: dict[str, Any] = {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "host.here"}}


def like_a_message(body: Any = "", headers: Any = None, **properties: Any) -> bytes:
    return json.dumps({"body": body, "headers": headers or {}, "properties": properties}).encode()


@pytest.mark.parametrize(
    "text",
    [
        *(b"by hand", b"\xff\xfe", b"", b"[1]", b"null", b"{}"),
        *(b"[" * 5000, b'{"a":' + b"1" * 5000 + b"}"),
        *(b'{"__type__":"datetime","__value__":1}', b'{"__type__":[],"__value__":1}'),
        *(b'{"__type__":"decimal","__value__":"x"}', b'[{"__type__":"bytes","__value__":"a"}]'),
        like_a_message(headers={"task": {}}, **TO_HERE),
        like_a_message(delivery_tag=7),
        like_a_message(delivery_tag="t"),
        like_a_message(7, **TO_HERE),
        like_a_message("", [1], **TO_HERE),
        like_a_message("x", **TO_HERE, body_encoding="no"),
        like_a_message("a", **TO_HERE, body_encoding="base64"),
    ],
)
def test_what_is_no_message_is_dropped_with_words_and_the_next_one_comes(
    broker: Settings, client, sender, caplog, text: bytes
) -> None:
    """kombu raises in the worker's event loop, which ends the worker: seen with text pushed by hand."""
    publish_place(sender, [("sb-00000000000000a1", 1, broker.host)])
    queue = host_queue(broker.host)
    client.rpush(
        f"sandbatch:mq:{queue}\x06\x169", text
    )  # the end that is taken first; `place` has priority 9
    with make_app(broker, broker.host).connection_for_read() as connection:
        seen: list[str] = []
        with Consumer(
            connection,
            [Queue(queue, routing_key=queue)],
            on_message=lambda message: (seen.append(message.headers["id"]), message.ack()),
        ):
            while not seen:
                connection.drain_events(timeout=5)
    assert seen == ["sb-00000000000000a1.1.place"]
    assert client.zcard(f"sandbatch:mq:unacked_index.{broker.host}") == 0
    assert "no message of Celery" in caplog.text
