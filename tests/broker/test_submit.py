"""What clients publish, read from the queues as the workers find it."""

import base64
import json
from typing import Any

import pytest

from tasks.app import PRIORITY, host_queue, make_app, options, transport_options
from tasks.messages import Order
from tasks.state import State
from tasks.submit import publish_place, remove, submit
from tests.broker.conftest import take
from worker.errors import BadInput
from worker.spec import make_spec
from worker.stages import STAGES

SPEC = make_spec(args=["true"])
ON_H1 = make_spec(args=["true"], host="h1")
SEPARATOR = "\x06\x16"  # kombu's, between the name of a queue and a priority


def queues(client: Any) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Every message in the broker, by queue and priority."""
    found = {}
    for key in client.keys("sandbatch:mq:*"):
        if client.type(key) == "list":
            name, _, priority = key.removeprefix("sandbatch:mq:").partition(SEPARATOR)
            found[name, int(priority or 0)] = [json.loads(one) for one in client.lrange(key, 0, -1)]
    return found


def arguments(message: dict[str, Any]) -> dict[str, Any]:
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    return dict(kwargs)


def test_what_is_enqueued_waits_in_the_record_and_no_message_is_sent(sender, record, broker, client):
    """A list of messages would hand its head to a host that has no room for it."""
    batch, ids = submit(sender, record, broker, [SPEC, ON_H1, SPEC])
    assert queues(client) == {}
    assert {row["state"] for row in record.get_all()} == {"queued"}
    assert record.get(ids[0])["batch"] == batch
    assert record.batch_ids(batch) == ids


def test_the_message_says_in_flower_which_sandbox_it_is_of(sender, record, broker, client):
    """And nothing of its spec, which may hold secrets."""
    spec = make_spec(args=["true", "hunter2"], env={"TOKEN": "hunter2"}, host="h1")
    _, (container_id,) = submit(sender, record, broker, [spec])
    publish_place(sender, [(container_id, 1, "h1")])
    ((where, (message,)),) = queues(client).items()
    assert where == ("host.h1", PRIORITY["place"])  # behind everything else
    assert arguments(message) == {"message": Order(container_id=container_id, attempt=1).model_dump()}
    assert message["headers"]["argsrepr"] == f"place · {container_id} · h1"
    assert "hunter2" not in json.dumps(message) + json.dumps(arguments(message))


def test_a_big_batch_is_enqueued_whole_and_once(sender, record, broker, client):
    """More than one pipeline."""
    batch, ids = submit(sender, record, broker, [SPEC] * 2500, batch="big")
    assert (batch, len(set(ids))) == ("big", 2500)
    rows = record.get_all()
    assert {row["state"] for row in rows} == {"queued"}
    assert [row["id"] for row in rows] == ids
    assert record.batch("big")["total"] == 2500
    taken: list[str] = []
    while some := take(record, capacity=5000, slots=5000):
        taken += some
    assert taken == ids  # the first in is the first out


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a" * 64, "a\n"])
def test_a_batch_name_that_is_none_enqueues_nothing(sender, record, broker, client, name):
    with pytest.raises(BadInput, match="batch name"):
        submit(sender, record, broker, [SPEC], batch=name)
    assert client.keys("*") == []


# -- removal -------------------------------------------------------------------------------------


def rows(record, *ids: str) -> list[dict[str, Any]]:
    return record.get_all(list(ids))


def test_what_no_host_has_taken_is_cancelled_at_once(sender, record, broker, client):
    _, (container_id,) = submit(sender, record, broker, [SPEC])
    before = queues(client)
    remove(sender, record, rows(record, container_id))
    assert record.get(container_id)["state"] == "cancelled"
    assert record.get(container_id)["removed"]
    assert queues(client) == before


def test_what_a_host_has_is_undone_there_before_anything_else(sender, record, broker, client):
    _, (container_id,) = submit(sender, record, broker, [SPEC])
    assert take(record) == [container_id]
    remove(sender, record, rows(record, container_id))
    ((where, (message,)),) = queues(client).items()
    assert where == ("host.h1", 0)
    assert message["headers"]["task"] == "sandbatch.unwind"
    assert arguments(message) == {
        "message": Order(container_id=container_id, attempt=1).model_dump(),
        "final": "exited",
        "forget": True,
    }
    assert record.get(container_id)["removed"]


def test_one_that_is_taken_while_it_is_removed_is_undone_by_its_host(sender, record, broker, client):
    """What the caller has read is old by then."""
    _, (container_id,) = submit(sender, record, broker, [SPEC])
    read = rows(record, container_id)
    assert take(record) == [container_id]
    record.put(container_id, State.LAUNCHING, 2, {})
    remove(sender, record, read)
    (message,) = queues(client)["host.h1", 0]
    assert arguments(message)["message"]["attempt"] == 2


def test_what_has_ended_is_only_marked(sender, record, broker, client):
    _, (container_id,) = submit(sender, record, broker, [SPEC])
    assert take(record) == [container_id]
    record.put(container_id, State.FAILED, 1, {})
    before = queues(client)
    remove(sender, record, rows(record, container_id))
    assert queues(client) == before
    assert (record.get(container_id)["state"], record.get(container_id)["removed"]) == ("failed", True)


def test_removing_twice_is_harmless(sender, record, broker, client):
    _, (container_id,) = submit(sender, record, broker, [SPEC])
    for _ in range(2):
        remove(sender, record, rows(record, container_id))
    assert record.get(container_id)["state"] == "cancelled"


# -- the app -------------------------------------------------------------------------------------


def test_every_step_has_a_queue_and_a_priority():
    """0 is the highest on Redis: undo first, what is nearly done next, new work last."""
    launch = [options(stage.name, "h1")["priority"] for stage in STAGES]
    assert launch == sorted(launch, reverse=True)
    assert len(set(launch)) == len(launch)
    assert all(options(f"undo.{stage.name}", "h1")["priority"] == 0 for stage in STAGES)
    assert options("place", None)["priority"] > max(launch)
    assert options("undo.netns", "h1")["queue"] == host_queue("h1") == "host.h1"
    assert set(PRIORITY.values()) <= set(transport_options("h1")["priority_steps"])


def test_each_owner_books_its_messages_for_itself():
    """A host finds what it had taken when it starts anew, and touches nobody else's."""
    names = ("unacked_key", "unacked_index_key", "unacked_mutex_key")
    one, other = transport_options("h1"), transport_options("h2")
    assert not {one[name] for name in names} & {other[name] for name in names}
    assert one["global_keyprefix"] == other["global_keyprefix"]


def test_only_json_is_taken_and_sent(broker):
    """Whoever can write to the broker must not be able to send code."""
    with make_app(broker, "h1") as app:
        assert app.conf.accept_content == ["json"]
        assert (app.conf.task_serializer, app.conf.event_serializer) == ("json", "json")


def test_a_host_reads_the_shared_queue_and_its_own(broker):
    with make_app(broker, "h1") as app:
        assert {queue.name for queue in app.conf.task_queues} == {"launch", f"host.{broker.host}"}
