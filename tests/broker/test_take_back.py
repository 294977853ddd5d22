"""What a killed worker had taken goes back to its queue when the next one starts."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tasks.submit import publish_place, publish_unwind
from tests.broker.test_submit import arguments, queues

IDS = ("sb-00000000000000a2", "sb-00000000000000a3")

# A worker's consumer that says what it has taken, and acknowledges nothing.
TAKE = """
import sys
from tasks.app import make_app, settings
app = make_app(settings(), settings().host)
with app.connection_for_read() as connection:
    channel = connection.channel()
    consumer = app.amqp.TaskConsumer(channel, queues=app.conf.task_queues)
    consumer.qos(prefetch_count=2)
    consumer.register_callback(lambda body, message: print(message.headers["id"], flush=True))
    consumer.consume()
    while True:
        connection.drain_events()
"""
CLIENT = None  # a client of release 0.1.0 asks any host, by the shared queue
TAKE_BACK = "from tasks.consumer import take_back_messages; print(take_back_messages())"


def sent(client: Any) -> dict[tuple[str, int], list[str]]:
    return {
        where: [arguments(message)["message"]["container_id"] for message in messages]
        for where, messages in queues(client).items()
    }


@pytest.fixture
def taken(cli, client) -> Any:
    """Take two messages as a worker of a host does, and be killed; which host, and the tasks' ids."""

    def take(host: str) -> list[str]:
        env = {**cli.environment, "SANDBATCH_HOST": host}
        argv = [sys.executable, "-c", TAKE]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as worker:
            ids = [worker.stdout.readline().strip() for _ in range(2)]
            worker.kill()
        return ids

    return take


def test_messages_that_a_killed_worker_had_taken_go_back_to_their_queues(cli, client, sender, broker, taken):
    """At once, and not when the visibility timeout of ten minutes is over."""
    container_id = "sb-00000000000000a1"
    publish_place(sender, [("sb-00000000000000a2", 1, CLIENT), ("sb-00000000000000a3", 1, broker.host)])
    publish_unwind(sender, container_id, 1, broker.host, "exited")
    before = sent(client)
    taken_ids = taken(broker.host)
    assert len(set(taken_ids)) == 2
    assert sum(map(len, sent(client).values())) == 1

    done = cli.python("-c", TAKE_BACK)

    assert done.stdout == "2\n", done.stderr
    assert sent(client) == before
    left = client.keys("sandbatch:mq:unacked*")
    assert left == []
    assert cli.python("-c", TAKE_BACK).stdout == "0\n"


def test_they_are_marked_as_delivered_before(cli, client, sender, broker, taken):
    publish_place(sender, [(one, 1, CLIENT) for one in IDS])
    taken(broker.host)
    cli.python("-c", TAKE_BACK)
    messages = queues(client)["launch", 9]
    assert [message["properties"]["delivery_info"].get("redelivered") for message in messages] == [True] * 2


def test_what_another_host_has_taken_is_its_own(cli, client, sender, broker, taken):
    """It works on it."""
    publish_place(sender, [(one, 1, CLIENT) for one in IDS])
    taken("another")
    assert cli.python("-c", TAKE_BACK).stdout == "0\n"
    assert queues(client) == {}
    assert cli.python("-c", TAKE_BACK, SANDBATCH_HOST="another").stdout == "2\n"
    assert len(queues(client)["launch", 9]) == 2


def test_undo_is_taken_before_work_that_waited_longer(client, sender, broker, taken):
    publish_place(sender, [(one, 1, CLIENT) for one in (*IDS, "sb-00000000000000a4")])
    publish_unwind(sender, "sb-00000000000000a1", 1, broker.host, "exited")
    first, second = taken(broker.host)
    body = client.hvals(f"sandbatch:mq:unacked.{broker.host}")
    tasks = {json.loads(one)[0]["headers"]["id"]: json.loads(one)[0]["headers"]["task"] for one in body}
    assert [tasks[first], tasks[second]] == ["sandbatch.unwind", "sandbatch.place"]
