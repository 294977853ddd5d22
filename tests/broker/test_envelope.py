"""What a host with keys takes out of its queue, and what it does not."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from kombu import Consumer, Queue

from tasks import signing
from tasks.app import host_queue, make_app
from tasks.submit import publish_place, publish_stop, publish_unwind
from worker.settings import Settings

ONE = "sb-00000000000000a1"
NAMES = ("user-alice", "host-here", "host-other")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for who in NAMES:
        signing.make_key(tmp_path, who)
    signing._seen.cache_clear()
    return tmp_path


class Place:
    """A queue of a host, what is sent to it, and what the host takes."""

    def __init__(self, broker: Settings, client: Any, keys: Path) -> None:
        self.client, self.keys = client, keys
        (keys / "run").mkdir()
        self.settings = broker.model_copy(
            update={"signing_key": keys / "host-here.key", "trusted_keys": keys, "run_dir": keys / "run"}
        )
        self.broker_url = f"redis+socket://{broker.broker_socket}"
        self.settings = self.settings.model_copy(update={"broker_url": self.broker_url})
        self.queue = host_queue("here")

    def app(self, who: str | None, folder: Path | None = None) -> Any:
        key = (folder or self.keys) / f"{who}.key" if who else None
        return make_app(self.settings.model_copy(update={"signing_key": key, "trusted_keys": None}), "client")

    def send(self, who: str | None, task: str, body: dict[str, Any] | None = None, **options: Any) -> None:
        with self.app(who) as app:
            app.send_task(
                task, kwargs=body or {"message": {}}, queue=self.queue, **{"priority": 0, **options}
            )

    def lying(self) -> list[dict[str, Any]]:
        """The messages in the queue, as they lie there."""
        texts = [
            text
            for key in self.client.keys(f"sandbatch:mq:{self.queue}*")
            for text in self.client.lrange(key, 0, -1)
        ]
        return [json.loads(text) for text in texts]

    def put(self, message: dict[str, Any], queue: str | None = None) -> None:
        self.client.lpush(f"sandbatch:mq:{queue or self.queue}", json.dumps(message))

    def taken(self, *, back: bool = False) -> list[str]:
        """The tasks that a worker of the host would work on."""
        found: list[str] = []
        self.send("host-here", "the.end", priority=9)

        def on_message(message: Any) -> None:
            found.append(message.headers["task"])
            if back and len(found) == 1:
                message.reject(requeue=True)
            else:
                message.ack()

        with make_app(self.settings, "here").connection_for_read() as connection:
            consumer = Consumer(
                connection, [Queue(self.queue, routing_key=self.queue)], on_message=on_message
            )
            with consumer:
                while "the.end" not in found:
                    connection.drain_events(timeout=5)
        return [task for task in found if task != "the.end"]


@pytest.fixture
def place(broker: Settings, client: Any, keys: Path) -> Place:
    return Place(broker, client, keys)


def test_what_users_and_the_host_itself_send_is_taken(place: Place) -> None:
    with place.app("user-alice") as app:
        publish_unwind(app, ONE, 1, "here", "cancelled")
        publish_stop(app, ONE, 1, "here", 10.0)
        publish_place(app, [(ONE, 1, "here")])
    place.send("host-other", "sandbatch.unwind")
    place.send("host-here", "sandbatch.container")
    place.send("host-here", "sandbatch.undo.netns", chain=[{"task": "sandbatch.undo.netns"}])
    assert sorted(place.taken()) == [
        *("sandbatch.container", "sandbatch.place", "sandbatch.stop", "sandbatch.undo.netns"),
        *("sandbatch.unwind", "sandbatch.unwind"),
    ]


@pytest.mark.parametrize("task", ["sandbatch.container", "sandbatch.unwind", "celery.backend_cleanup", "x"])
def test_the_unsigned_and_the_foreign_are_refused_whatever_they_name(
    place: Place, tmp_path, caplog, task
) -> None:
    place.send(None, task)
    (tmp_path / "others").mkdir()
    for who in ("user-alice", "user-mallory", "host-here"):
        signing.make_key(tmp_path / "others", who)
        with place.app(who, tmp_path / "others") as app:
            app.send_task(task, kwargs={}, queue=place.queue)
    assert place.taken() == []
    assert caplog.text.count("is refused") == 4
    assert "it is not signed; set signing_key where it was sent" in caplog.text
    assert "user-mallory, whose key this host does not know" in caplog.text


@pytest.mark.parametrize("who", ["user-alice", "host-other"])
@pytest.mark.parametrize(
    "task", ["sandbatch.container", "sandbatch.undo.netns", "sandbatch.ready", "celery.chain"]
)
def test_stages_come_from_the_host_itself_alone(place: Place, caplog, who: str, task: str) -> None:
    place.send(who, task)
    assert place.taken() == []
    assert f"may not send {task} to this host" in caplog.text


@pytest.mark.parametrize("name", ["chain", "link", "link_error"])
def test_nothing_may_follow_on_what_a_user_sends_for_the_host_would_sign_it(
    place: Place, caplog, name: str
) -> None:
    with place.app("user-alice") as app:
        more = app.signature("sandbatch.container", kwargs={"message": {}}, queue=place.queue)
    place.send("user-alice", "sandbatch.unwind", **{name: [more]})
    assert place.taken() == []
    assert "may not have tasks follow on one" in caplog.text


def changed(message: dict[str, Any], what: str) -> dict[str, Any]:
    headers, properties = message["headers"], message["properties"]
    body = json.loads(base64.b64decode(message["body"]))
    if what == "body":
        body[1]["final"] = "exited"
        return {**message, "body": base64.b64encode(json.dumps(body).encode()).decode()}
    if what == "routing":
        where = {**properties["delivery_info"], "routing_key": "host.other"}
        return {**message, "properties": {**properties, "delivery_info": where}}
    if what == "type":
        return {**message, "content-type": "application/x-python-serialize"}
    change = {"task": "sandbatch.container", "id": "other", "eta": "2030-01-01T00:00:00+00:00"}[what]
    return {**message, "headers": {**headers, what: change}}


@pytest.mark.parametrize("what", ["body", "routing", "type", "task", "id", "eta"])
def test_no_part_of_a_message_can_be_changed(place: Place, caplog, what: str) -> None:
    with place.app("user-alice") as app:
        publish_unwind(app, ONE, 1, "here", "cancelled")
    (message,) = place.lying()
    place.client.delete(*place.client.keys("sandbatch:mq:host.here*"))
    place.put(changed(message, what))
    assert place.taken() == []
    assert "or it was changed since" in caplog.text


def test_a_message_to_another_host_is_not_for_this_one(place: Place, caplog) -> None:
    place.send("user-alice", "sandbatch.unwind")
    (message,) = place.lying()
    place.client.delete(*place.client.keys("sandbatch:mq:host.here*"))
    key = place.keys / "host-other.key"
    other = place.settings.model_copy(update={"host": "other", "signing_key": key})
    place.put(message, "host.other")
    taken: list[Any] = []
    with (
        make_app(other, "other").connection_for_read() as connection,
        Consumer(connection, [Queue("host.other")], on_message=taken.append),
    ):
        connection.drain_events(timeout=5)
    assert not taken
    assert "or it was changed since" in caplog.text


def test_what_was_done_with_is_refused_also_by_the_next_worker(place: Place, caplog) -> None:
    place.send("user-alice", "sandbatch.unwind")
    (message,) = place.lying()
    assert place.taken() == ["sandbatch.unwind"]
    place.put(message)
    assert place.taken() == []
    assert "this host has done with it before; is it a replay?" in caplog.text
    signing._seen.cache_clear()
    place.put(message)
    assert place.taken() == []


def test_what_comes_again_and_was_not_acknowledged_is_taken_again(place: Place) -> None:
    """A worker that was killed over it, or a broker that went away: at least once, as ever."""
    place.send("user-alice", "sandbatch.unwind")
    assert place.taken(back=True) == ["sandbatch.unwind", "sandbatch.unwind"]


def test_the_stale_is_refused(place: Place, caplog, monkeypatch) -> None:
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() - 901)
        place.send("user-alice", "sandbatch.unwind")
    assert place.taken() == []
    assert "user alice signed it 90" in caplog.text


def test_a_stranger_cannot_fill_the_log(place: Place, caplog) -> None:
    for _ in range(50):
        place.send(None, "sandbatch.container")
    assert place.taken() == []
    assert caplog.text.count("is refused") == 10


def test_without_keys_nothing_is_signed_and_all_is_taken(place: Place) -> None:
    place.settings = place.settings.model_copy(update={"signing_key": None, "trusted_keys": None})
    place.send(None, "sandbatch.container")
    assert all("sandbatch" not in message["headers"] for message in place.lying())
    assert place.taken() == ["sandbatch.container"]
