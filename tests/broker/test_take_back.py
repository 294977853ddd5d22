"""What a killed worker had taken goes back to its queue when the next one starts."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tasks.submit import publish_unwind, submit
from tests.broker.test_submit import SPEC, arguments, queues
from worker.spec import make_spec

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


def test_messages_that_a_killed_worker_had_taken_go_back_to_their_queues(
    cli, client, record, sender, broker, taken
):
    """At once, and not when the visibility timeout of ten minutes is over."""
    container_id = "sb-00000000000000a1"
    submit(sender, record, broker, [SPEC, make_spec(args=["true"], host=broker.host)])
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


def test_they_are_marked_as_delivered_before(cli, client, record, sender, broker, taken):
    submit(sender, record, broker, [SPEC, SPEC])
    taken(broker.host)
    cli.python("-c", TAKE_BACK)
    messages = queues(client)["launch", 9]
    assert [message["properties"]["delivery_info"].get("redelivered") for message in messages] == [True] * 2


def test_what_another_host_has_taken_is_its_own(cli, client, record, sender, broker, taken):
    """It works on it."""
    submit(sender, record, broker, [SPEC, SPEC])
    taken("another")
    assert cli.python("-c", TAKE_BACK).stdout == "0\n"
    assert queues(client) == {}
    assert cli.python("-c", TAKE_BACK, SANDBATCH_HOST="another").stdout == "2\n"
    assert len(queues(client)["launch", 9]) == 2


def test_undo_is_taken_before_work_that_waited_longer(client, record, sender, broker, taken):
    submit(sender, record, broker, [SPEC] * 3)
    publish_unwind(sender, "sb-00000000000000a1", 1, broker.host, "exited")
    first, second = taken(broker.host)
    body = client.hvals(f"sandbatch:mq:unacked.{broker.host}")
    tasks = {json.loads(one)[0]["headers"]["id"]: json.loads(one)[0]["headers"]["task"] for one in body}
    assert [tasks[first], tasks[second]] == ["sandbatch.unwind", "sandbatch.place"]
