"""Messages of another release: put aside whole, put back when the host is upgraded."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Producer

from tasks.app import host_queue, options
from tasks.foreign import KEPT, Foreign
from tasks.messages import Order
from tests.broker.conftest import HOST
from tests.broker.test_submit import arguments, queues

CONTAINER = "sb-00000000000000f1"
ORDER = Order(container_id=CONTAINER, attempt=1).model_dump()

# A worker's tasks without what a real host needs; it tells when it has nothing more to do with a message.
WORKER = """
import os
from tasks import consumer, workflow
from tasks.app import settings
consumer._worker_pid = os.getpid()
workflow.app.worker_main(["worker", f"--queues=launch,host.{settings().host}", "--concurrency=1",
                          "--pool=prefork", "--without-gossip", "--without-mingle", "--loglevel=ERROR"])
"""


@pytest.fixture
def start_worker(cli: Any, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Start a worker; its log goes to `tmp_path/log`."""
    with contextlib.ExitStack() as stack, (tmp_path / "log").open("a") as log:

        def start() -> None:
            argv = [sys.executable, "-c", WORKER]
            worker = subprocess.Popen(argv, stderr=log, env=cli.environment)
            stack.callback(worker.wait, 50)
            stack.callback(worker.terminate)

        yield start


def publish(sender: Any, task: str, host: str | None = HOST, **kwargs: Any) -> None:
    sender.send_task(f"sandbatch.{task}", kwargs=kwargs, **options("place", host))


def wait_for(client: Any, is_true: Callable[[], bool], log: Path) -> None:
    """The worker's own keys change: each change of them is told."""
    with client.pubsub() as told:
        client.config_set("notify-keyspace-events", "KA")
        told.psubscribe("__keyspace@0__:sandbatch:*")
        while not is_true():
            assert told.get_message(timeout=50) is not None, log.read_text()


def aside(client: Any) -> list[dict[str, Any]]:
    return [json.loads(one) for one in client.lrange(f"sandbatch:foreign:{HOST}", 0, -1)]


def test_what_a_worker_cannot_read_is_put_aside_whole_and_the_rest_is_done(
    sender, client, start_worker, tmp_path
):
    publish(sender, "place", message={**ORDER, "kind": "order/v9"})
    publish(sender, "hibernate", message=ORDER)
    publish(sender, "unwind", message=ORDER, final="exited", forget=False, mood="good")
    publish(sender, "ready", message=ORDER, outcome="../x", detail="")
    publish(sender, "stop", None, message=ORDER)  # without what it needs; in the shared queue
    with sender.producer_pool.acquire() as producer:
        raw: Producer = producer
        where = {"exchange": host_queue(HOST), "routing_key": host_queue(HOST), "priority": 9}
        raw.publish("x: [", content_type="application/x-yaml", content_encoding="utf-8", **where)
        headers = {"task": "sandbatch.place", "id": "1"}
        raw.publish("{", headers=headers, content_type="application/json", content_encoding="utf-8", **where)
        raw.publish(json.dumps([]), content_type="application/json", content_encoding="utf-8", **where)
    before = sorted(
        (message["body"], message["headers"].get("task"))
        for some in queues(client).values()
        for message in some
    )
    start_worker()
    log = tmp_path / "log"
    wait_for(client, lambda: len(aside(client)) == len(before), log)
    kept = [json.loads(one["message"])[0] for one in aside(client)]
    assert sorted((one["body"], one["headers"].get("task")) for one in kept) == before
    reasons = {one["task"]: one["why"] for one in aside(client)}
    assert reasons["sandbatch.hibernate"] == "there is no such task"
    assert "mood" in reasons["sandbatch.unwind"]
    assert "reason" in reasons["sandbatch.stop"]
    assert reasons["sandbatch.ready"].startswith("outcome '../x'")
    publish(sender, "place", message={**ORDER, "attempt": 3})  # the queues flow on
    wait_for(client, lambda: not queues(client) and not client.keys("sandbatch:mq:unacked.*"), log)
    assert len(aside(client)) == len(before)
    words = log.read_text()
    assert "message sandbatch.place is not for release 0.2.0: kind 'order/v9'" in words
    assert "upgraded" in words


# -- without a worker ----------------------------------------------------------------------------


def taken(sender: Any, client: Any) -> str:
    """A message as a worker has it between its queue and its acknowledgement; its tag."""
    publish(sender, "hibernate", message=ORDER)
    ((key, (raw,)),) = ((key, client.lrange(key, 0, -1)) for key in client.keys("sandbatch:mq:host.*"))
    client.delete(key)
    message, prefix = json.loads(raw), "sandbatch:mq:unacked"
    tag = str(message["properties"]["delivery_tag"])
    where = message["properties"]["delivery_info"]
    client.hset(f"{prefix}.{HOST}", tag, json.dumps([message, where["exchange"], where["routing_key"]]))
    client.zadd(f"{prefix}_index.{HOST}", {tag: 1})
    return tag


def test_one_that_is_acknowledged_already_is_not_put_aside(client):
    """Its twin was: a worker lost its connection meanwhile."""
    foreign = Foreign(client, HOST)
    foreign.set_aside("gone", "sandbatch.hibernate", "there is no such task")
    assert foreign.count() == 0


def test_the_next_release_puts_it_back_into_its_queue_and_this_one_does_not(sender, client, cli, monkeypatch):
    """Else what nobody can read would go round and round."""
    foreign = Foreign(client, HOST)
    foreign.set_aside(taken(sender, client), "sandbatch.hibernate", "there is no such task")
    assert client.keys("sandbatch:mq:unacked*") == []
    assert foreign.put_back() == 0
    assert foreign.count() == 1
    monkeypatch.setattr("tasks.foreign.RELEASE", "0.3.0")
    assert foreign.put_back() == 1
    assert foreign.count() == 0
    assert (
        cli.python("-c", "from tasks.consumer import take_back_messages; take_back_messages()").returncode
        == 0
    )
    ((where, (message,)),) = queues(client).items()
    assert where == (host_queue(HOST), 9)  # with its priority
    assert arguments(message) == {"message": ORDER}


def test_there_is_a_limit_and_the_log_says_what_was_lost_for_it(sender, client, caplog):
    pipe = client.pipeline()
    for number in range(KEPT):
        pipe.rpush(f"sandbatch:foreign:{HOST}", json.dumps({"task": f"old{number}", "why": "v0"}))
    pipe.execute()
    foreign = Foreign(client, HOST)
    foreign.set_aside(taken(sender, client), "sandbatch.new", "there is no such task")
    assert foreign.count() == KEPT
    assert aside(client)[0]["task"] == "old1"
    assert "the oldest is lost, old0: v0" in caplog.text
