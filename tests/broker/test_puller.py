"""The thread that takes work for a host, beside a broker that comes and goes."""

import queue
import threading
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from tasks import puller
from tasks.puller import Puller
from tasks.state import State
from tests.broker.conftest import take
from tests.broker.test_submit import arguments, queues
from tests.broker.test_take import move
from worker.spec import make_spec


@pytest.fixture
def take_with(sender, record, broker, gone_on) -> Any:
    """A puller that has room for two at a time."""
    broker.state_dir.mkdir(exist_ok=True)
    room = {"capacity": 2, "slots": 2, "rooms": {"mynet": -1}}
    made = Puller(sender, record, broker, lambda: room, lambda *launch: gone_on.put(launch))
    yield made
    made.stop()


@pytest.fixture
def gone_on() -> "queue.Queue[tuple[str, int]]":
    """The launches that went on."""
    return queue.Queue()


def test_what_was_taken_when_the_broker_went_away_is_published_once_it_is_back(
    record, client, broker, take_with, monkeypatch
):
    """It need not wait for the sweep, which gives a message some seconds."""
    ids = [f"sb-{number:016x}" for number in range(3)]
    spec = make_spec(args=["true"], network="mynet")
    record.enqueue("b-1", [(one, spec) for one in ids])
    tries, sent = [], threading.Event()

    def publish(app, wanted) -> None:
        tries.append(wanted)
        if len(tries) == 1:
            raise OperationalError("gone")
        puller_publish(app, wanted)
        sent.set()

    puller_publish = puller.publish_place
    monkeypatch.setattr(puller, "publish_place", publish)
    take_with.start()

    assert sent.wait(10)
    assert tries[0] == tries[1] == [(one, 1, broker.host) for one in ids[:2]]
    (messages,) = queues(client).values()
    assert sorted(arguments(one)["message"]["container_id"] for one in messages) == ids[:2]


def test_a_launch_whose_image_came_goes_on_as_soon_as_there_is_a_slot(record, broker, take_with, gone_on):
    """Also while the host takes nothing new."""
    waiting = f"sb-{1:016x}"
    record.enqueue("b-1", [(waiting, make_spec(args=["true"], network="mynet"))])
    assert take(record, broker.host) == [waiting]
    move(record, waiting, State.LAUNCHING, host=broker.host, stage="image", waits="1")
    record.drain(broker.host, True)
    take_with.start()
    record.admit(broker.host, [waiting], 10)
    assert gone_on.get(timeout=10) == (waiting, 1)
