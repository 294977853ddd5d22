"""Placement: what a host takes from what waits, by one script."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tasks.keys import LINES, PREFIX
from tasks.record import Record
from tasks.state import State
from tests.broker.conftest import take
from worker import journal
from worker.settings import Settings
from worker.spec import make_spec

MIB = 2**20


def ids(count: int, start: int = 0) -> list[str]:
    return [f"sb-{number:016x}" for number in range(start, start + count)]


def enqueue(record: Record, count: int, start: int = 0, **spec: Any) -> list[str]:
    made = ids(count, start)
    one = make_spec(args=["true"], network=spec.pop("network", "mynet"), **spec)
    record.enqueue("b-1", [(container_id, one) for container_id in made])
    return made


def move(record: Record, container_id: str, *states: State, **fields: str) -> None:
    for state in states:
        assert record.put(container_id, state, 1, fields) > 0


# -- room ----------------------------------------------------------------------------------------


def test_the_first_in_is_the_first_out(record):
    waiting = enqueue(record, 5)
    assert take(record, slots=2) == waiting[:2]
    assert record.get(waiting[0])["host"] == "h1"
    assert take(record, "h2", slots=3) == waiting[2:]


def test_a_host_takes_no_more_than_its_capacity_at_any_moment(record):
    """Whatever else takes, and from however many threads it asks."""
    waiting = enqueue(record, 40)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: take(record, f"h{n % 4}", capacity=5), range(32)))
    assert sum(map(len, answers)) == 20
    for number in range(4):
        assert len(record.wishes_on(f"h{number}")) == 5
    assert [row["state"] for row in record.get_all(waiting)].count("queued") == 20


def test_a_host_takes_its_share_in_one_look(record, heartbeat):
    """One bell wakes all hosts: the first of them is not to take all of a few."""
    for host in ("h1", "h2", "h3"):
        heartbeat(host)
    waiting = enqueue(record, 4)
    pinned = enqueue(record, 2, start=10, host="h1")
    assert take(record, "h1") == [*pinned, *waiting[:2]]
    assert take(record, "h2") == waiting[2:3]
    assert take(record, "h1") == waiting[3:]


def test_a_sandbox_that_has_ended_makes_room(record):
    waiting = enqueue(record, 3)
    assert take(record, capacity=1) == waiting[:1]
    move(record, waiting[0], State.LAUNCHING, State.RUNNING)
    assert take(record, capacity=1) == []
    move(record, waiting[0], State.EXITED)
    assert take(record, capacity=1) == waiting[1:2]


def test_a_launch_takes_a_slot_until_its_program_is_started(record):
    """What waits for a port to answer costs the host nothing."""
    waiting = enqueue(record, 3)
    assert take(record, slots=1) == waiting[:1]
    move(record, waiting[0], State.LAUNCHING, stage="network")
    assert take(record, slots=1) == []
    move(record, waiting[0], State.LAUNCHING, stage="ready")
    assert take(record, slots=1) == waiting[1:2]
    move(record, waiting[1], State.FAILED)
    assert take(record, slots=1) == waiting[2:]


def test_memory_is_counted_for_those_that_ask_for_none_too(record):
    big = enqueue(record, 2, memory_bytes=300 * MIB)
    small = enqueue(record, 4, start=10)
    room = {"memory": 500 * MIB, "each": 100 * MIB}
    assert take(record, **room) == [big[0], *small[:2]]  # the second big one does not hold up the small
    move(record, big[0], State.FAILED)
    assert take(record, **room) == [big[1]]


@pytest.mark.parametrize("state", [State.FAILED, State.EXITED, State.CANCELLED])
def test_memory_comes_back_with_each_end(record, state):
    waiting = enqueue(record, 2, memory_bytes=300 * MIB)
    assert take(record, memory=400 * MIB) == waiting[:1]
    move(record, waiting[0], State.LAUNCHING, State.UNDOING, state)
    assert take(record, memory=400 * MIB) == waiting[1:]


def test_a_network_without_room_takes_no_more_and_the_others_do(record):
    here = enqueue(record, 3)
    there = enqueue(record, 2, start=10, network="other")
    assert take(record, rooms={"mynet": 0, "other": -1}) == there
    assert take(record, rooms={"mynet": 2, "other": 0}) == here[:2]


def test_what_is_taken_and_has_no_address_yet_uses_one(record):
    """The host counts leases, and there is none before the network's ADD."""
    waiting = enqueue(record, 4)
    assert take(record, slots=1, rooms={"mynet": 2}) == waiting[:1]
    assert take(record, rooms={"mynet": 2}) == waiting[1:2]
    assert take(record, rooms={"mynet": 2}) == []
    move(record, waiting[0], State.LAUNCHING, stage="bundle")  # its lease is counted by the host now
    assert take(record, rooms={"mynet": 1}) == []
    assert take(record, rooms={"mynet": 2}) == waiting[2:3]


def test_ten_thousand_that_fit_nowhere_hold_up_nobody(record):
    enqueue(record, 3000, memory_bytes=10**12)
    enqueue(record, 100, start=5000, on={"gpu": "true"})
    small = enqueue(record, 2, start=9000)
    before = time.perf_counter()
    assert take(record, memory=10**9) == small
    assert time.perf_counter() - before < 1


# -- which host ----------------------------------------------------------------------------------


def test_what_is_pinned_goes_to_its_host_alone_and_first(record):
    anywhere = enqueue(record, 1)
    pinned = enqueue(record, 1, start=10, host="h1")
    assert take(record, "h2", slots=1) == anywhere
    assert take(record, "h2") == []
    assert take(record, "h1") == pinned


def test_pinned_work_does_not_wait_behind_other_work_of_its_host(record):
    anywhere, pinned = enqueue(record, 1), enqueue(record, 1, start=10, host="h1")
    assert take(record, slots=1) == pinned
    assert take(record) == anywhere


@pytest.mark.parametrize(
    ("labels", "is_taken"),
    [
        ({"gpu": "true", "zone": "a", "more": ""}, True),
        ({"gpu": "true"}, False),
        ({"gpu": "false", "zone": "a"}, False),
        ({}, False),
    ],
)
def test_labels_select_hosts_that_have_all_of_them(record, labels, is_taken):
    waiting = enqueue(record, 1, on={"gpu": "true", "zone": "a"})
    assert take(record, labels=labels) == (waiting if is_taken else [])


def test_a_label_without_a_value_is_asked_for_as_such(record):
    waiting = enqueue(record, 1, on={"gpu": ""})
    assert take(record, labels={"gpu": "true"}) == []
    assert take(record, labels={"gpu": ""}) == waiting


def test_a_host_without_the_network_leaves_it_to_others_unless_it_is_pinned(record):
    enqueue(record, 1, network="elsewhere")
    pinned = enqueue(record, 1, start=10, network="elsewhere", host="h1")
    assert take(record) == pinned  # it fails there, with words


def test_a_spec_of_a_kind_that_is_not_known_waits_for_a_host_that_knows_it(record, client):
    waiting = enqueue(record, 1)
    (line,) = client.smembers(LINES)
    client.rename(f"{PREFIX}line:{line}", f"{PREFIX}line:{line.replace('spec/v1', 'spec/v9')}")
    client.sadd(LINES, line.replace("spec/v1", "spec/v9"))
    assert take(record) == []
    assert record.get(waiting[0])["state"] == "queued"


def test_a_drained_host_takes_nothing_not_even_what_is_pinned(record, client):
    enqueue(record, 1)
    enqueue(record, 1, start=10, host="h1")
    client.hset(f"{PREFIX}drains", "h1", '{"drained":true,"at":1,"why":""}')
    assert take(record) == []
    client.hset(f"{PREFIX}drains", "h1", '{"drained":false,"at":2,"why":""}')
    assert len(take(record)) == 2


# -- what is lost or withdrawn -------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["removed", "cancel"])
def test_what_is_withdrawn_is_passed_over(record, client, mark):
    waiting = enqueue(record, 3)
    client.hset(f"{PREFIX}sb:{waiting[0]}", mark, "1")
    assert take(record, slots=1) == waiting[1:2]


def test_what_a_host_of_the_release_before_has_claimed_leaves_the_line(record, client):
    """Its own script knows no lines."""
    waiting = enqueue(record, 2)
    client.hset(f"{PREFIX}sb:{waiting[0]}", mapping={"state": "placed", "host": "old"})
    assert take(record, slots=1) == waiting[1:]
    assert client.zcard(f"{PREFIX}queued") == 0


def test_a_record_that_has_gone_leaves_the_line(record, client):
    waiting = enqueue(record, 2)
    client.delete(f"{PREFIX}sb:{waiting[0]}")
    assert take(record) == waiting[1:]


def test_a_slot_whose_launch_is_known_no_more_is_free_again(record, client):
    """The broker lost a part, or the host's report came twice."""
    client.sadd(f"{PREFIX}host:h1:launching", "sb-00000000000000ff")
    waiting = enqueue(record, 1)
    assert take(record, slots=1) == waiting


def test_an_empty_line_is_forgotten(record, client):
    enqueue(record, 1, on={"gpu": "true"})
    take(record, labels={"gpu": "true"})
    take(record)
    assert client.smembers(LINES) == set()


def test_what_stands_in_no_line_is_put_in_its_own(record, client):
    """Its client is of the release before."""
    (container_id,) = enqueue(record, 1)
    (line,) = client.smembers(LINES)
    client.delete(f"{PREFIX}line:{line}", LINES)
    client.hdel(f"{PREFIX}sb:{container_id}", "line", "queue", "memory", "nets")
    client.zadd(f"{PREFIX}queued", {container_id: 1})
    assert take(record) == []
    record.offer_again(0)
    assert take(record) == [container_id]


# -- bells ---------------------------------------------------------------------------------------


def rung(record: Record, settings: Settings, host: str, act: Any) -> bool:
    """Whether a host that sleeps is woken by `act`."""
    from tasks.connection import connect

    with connect(settings) as connection:
        sleeper = Record(connection)
        marks = sleeper.bells(host)
        thread = threading.Timer(0.05, act)
        thread.start()
        found = sleeper.wait_for_bell(marks, 2)
        thread.join()
    return found != marks


def test_what_is_enqueued_wakes_every_host(record, broker):
    assert rung(record, broker, "h7", lambda: enqueue(record, 1))


def test_an_end_and_a_started_program_wake_their_host(record, broker):
    first, second = enqueue(record, 2)
    take(record)
    assert rung(record, broker, "h1", lambda: move(record, first, State.LAUNCHING, stage="ready"))
    assert rung(record, broker, "h1", lambda: move(record, second, State.FAILED))
    assert not rung(record, broker, "h2", lambda: move(record, first, State.RUNNING, State.EXITED))


# -- a host that must not take ---------------------------------------------------------------------


def test_a_machine_whose_name_is_another_ones_now_takes_nothing(record):
    """It was cut off for so long that its name was free: it hears of that with its next heartbeat."""
    waiting = enqueue(record, 1)
    assert take(record, owner="mine") == [], "the broker has forgotten the name"
    record.take_name("h1", "another")
    assert take(record, owner="mine") == []
    assert take(record, owner="another") == waiting


def test_a_host_takes_nothing_before_a_broker_that_forgot_knows_what_it_has(record):
    """Else it would count no sandboxes, and the host would get more than it may have."""
    life = record.heartbeat("h1", {})
    old = enqueue(record, 1)
    assert take(record, capacity=1, life="") == [], "it has told nothing yet"
    assert take(record, capacity=1, life=life) == old
    record.client.flushall()
    new = enqueue(record, 1, start=10)
    assert take(record, capacity=1, life=life) == []
    later = record.heartbeat("h1", {})
    assert later != life
    assert take(record, capacity=1, life=life) == []
    assert take(record, capacity=1, life=later) == new


def test_what_a_broker_has_forgotten_was_taken_is_its_hosts_once_that_reports(record, tmp_path):
    """It was restored from older data: the sandbox waits in its line again, and runs already."""
    (one, other) = enqueue(record, 2)
    spec = make_spec(args=["true"], network="mynet")
    known = journal.create(tmp_path, one, attempt=1, batch="b-1", spec=spec)
    assert record.report(known, "h2") > 0
    row = record.get(one)
    assert (row["state"], row["host"]) == ("launching", "h2")
    assert [wish.container_id for wish in record.wishes_on("h2")] == [one]
    assert take(record) == [other]
