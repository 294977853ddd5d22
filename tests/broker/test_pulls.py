"""What the record knows of pulls: pins of batches, launches that wait for an image, orders, progress."""

import threading
from typing import Any

import pytest

from tasks import signing
from tasks.keys import PREFIX, TERMINAL_KEPT_S, batch_key, host_key
from tasks.pull_messages import PullMessages
from tasks.record import Record
from tasks.state import State
from tests.broker.conftest import take
from tests.broker.test_take import enqueue, move
from worker import fetcher
from worker import journal as journals
from worker.journal import Journal
from worker.spec import make_spec

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
BUSYBOX = "docker.io/library/busybox:latest"
ROOM = {"capacity": 100, "slots": 100, "rooms": {"mynet": -1}}


# -- pins ----------------------------------------------------------------------------------------


def test_the_first_host_that_resolves_a_reference_pins_it_for_its_batch(record):
    assert record.pinned("b-1", BUSYBOX) is None
    assert record.pin("b-1", BUSYBOX, ONE) == ONE
    assert record.pin("b-1", BUSYBOX, TWO) == ONE
    assert record.pin("b-2", BUSYBOX, TWO) == TWO
    assert record.pinned("b-1", BUSYBOX) == ONE


def test_a_pin_goes_with_its_batch(record, client):
    (only,) = enqueue(record, 1)
    record.pin("b-1", BUSYBOX, ONE)
    assert client.ttl(batch_key("b-1") + ":images") == -1
    take(record)
    move(record, only, State.LAUNCHING, State.EXITED)
    assert 0 < client.ttl(batch_key("b-1") + ":images") <= TERMINAL_KEPT_S
    record.pin("b-1", "docker.io/library/other:latest", ONE)  # by a host that comes late
    assert 0 < client.ttl(batch_key("b-1") + ":images") <= TERMINAL_KEPT_S
    enqueue(record, 1, start=5)  # it grows: all of it stays, once a host has asked
    assert record.pinned("b-1", BUSYBOX) == ONE
    assert client.ttl(batch_key("b-1") + ":images") == -1


def test_a_pin_of_a_batch_that_is_gone_does_not_stay_for_ever(record, client):
    record.pin("b-gone", BUSYBOX, ONE)
    assert 0 < client.ttl(batch_key("b-gone") + ":images") <= TERMINAL_KEPT_S


# -- launches that wait for an image -------------------------------------------------------------


def wait_for_image(record: Record, *ids: str) -> None:
    for one in ids:
        move(record, one, State.LAUNCHING, host="h1", stage="image", waits="1")


def go_on(record: Record, **have: Any) -> tuple[list[str], list[str]]:
    taken, admitted = record.take_and_admit("h1", {**ROOM, **have})
    return [one for one, _ in taken], [one for one, _ in admitted]


def test_what_waits_for_an_image_holds_no_slot_and_counts_in_the_capacity(record):
    waiting = enqueue(record, 4)
    assert take(record, slots=1) == waiting[:1]
    assert take(record, slots=1) == []
    wait_for_image(record, waiting[0])
    assert take(record, slots=1) == waiting[1:2]
    wait_for_image(record, waiting[1])
    assert take(record, slots=1, capacity=2) == []
    assert take(record, slots=1, capacity=3) == waiting[2:3]


def test_a_launch_that_begins_to_wait_rings_the_bell_of_its_host(record):
    (only,) = enqueue(record, 1)
    take(record)
    marks = record.bells("h1")
    wait_for_image(record, only)
    assert record.wait_for_bell(marks, 0.01) != marks


def test_no_more_go_on_than_there_are_slots_and_they_come_before_new_ones(record):
    ours = enqueue(record, 5)
    take(record)
    wait_for_image(record, *ours)
    new = enqueue(record, 2, start=10)
    marks = record.bells("h1")
    record.admit("h1", ours, 10)
    assert record.wait_for_bell(marks, 0.01) != marks
    assert go_on(record, slots=2) == ([], ours[:2])
    assert go_on(record, slots=2) == ([], [])
    move(record, ours[0], State.LAUNCHING, stage="ready", waits="0")
    assert go_on(record, slots=2) == ([], ours[2:3])
    for one in ours[1:3]:
        move(record, one, State.RUNNING)
    assert go_on(record, slots=5) == (new, ours[3:])


def test_a_host_that_takes_nothing_new_lets_go_on_what_it_has(record):
    """A full one, and a drained one."""
    (ours,) = enqueue(record, 1)
    take(record)
    wait_for_image(record, ours)
    enqueue(record, 1, start=10)
    record.drain("h1", True)
    record.admit("h1", [ours], 10)
    assert go_on(record, capacity=1) == ([], [ours])


def test_an_elder_look_for_work_lets_nothing_go_on(record):
    """Whoever asks with `take` does not publish it."""
    (ours,) = enqueue(record, 1)
    take(record)
    wait_for_image(record, ours)
    record.admit("h1", [ours], 10)
    assert take(record) == []
    assert go_on(record) == ([], [ours])


def test_to_line_up_twice_lets_go_on_once(record):
    (ours,) = enqueue(record, 1)
    take(record)
    wait_for_image(record, ours)
    for _ in range(2):
        record.admit("h1", [ours], 10)
    assert go_on(record) == ([], [ours])
    record.admit("h1", [ours], 10)
    assert go_on(record) == ([], [])


def test_one_whose_message_was_lost_is_lined_up_again(record):
    """The answer of TAKE reached nobody: its slot must not be held for ever, also if it is the only one."""
    (ours,) = enqueue(record, 1)
    take(record)
    wait_for_image(record, ours)
    record.admit("h1", [ours], 10)
    assert go_on(record, slots=1) == ([], [ours])
    record.admit("h1", [ours], 0)
    assert go_on(record, slots=1) == ([], [ours])


@pytest.mark.parametrize("state", [State.UNDOING, State.STOPPING, State.CANCELLED])
def test_what_ends_meanwhile_does_not_go_on(record, client, state):
    (ours,) = enqueue(record, 1)
    take(record)
    wait_for_image(record, ours)
    record.admit("h1", [ours], 10)
    move(record, ours, state)
    assert go_on(record) == ([], [])
    record.admit("h1", [ours], 10)
    assert client.exists(host_key("h1") + ":fetched", host_key("h1") + ":waiting") == 0


def test_addresses_are_promised_to_those_that_wait(record):
    ours = enqueue(record, 3)
    assert take(record, slots=1, rooms={"mynet": 2}) == ours[:1]
    wait_for_image(record, ours[0])
    assert take(record, rooms={"mynet": 2}) == ours[1:2]
    assert take(record, rooms={"mynet": 2}) == []


# -- what is pulled now --------------------------------------------------------------------------


def test_progress_is_shown_and_goes_by_itself(record, client, heartbeat):
    heartbeat("h1")
    row = {"reference": BUSYBOX, "digest": ONE, "phase": "pulling", "batches": ["b-1"], "since": "2"}
    older = {**row, "reference": "docker.io/library/other:latest", "batches": [], "since": "1"}
    record.show_pulls("h1", [row, older])
    assert record.pulls_on("h1") == [older, row]
    assert record.all_pulls() == {"h1": [older, row]}
    assert 0 < client.ttl(host_key("h1") + ":pulls") <= 30
    waits = {"host": "h1", "batch": "b-1", "stage": "image", "spec": {"image": BUSYBOX}}
    assert record.pull_for(waits) == row
    assert record.pull_for({**waits, "batch": "b-2"}) is None
    assert record.pull_for({**waits, "stage": "netns"}) is None
    record.show_pulls("h1", [])
    assert record.all_pulls() == {}


# -- orders --------------------------------------------------------------------------------------


def test_an_order_stays_until_its_host_has_carried_it_out(record, client):
    pull_id = record.write_order("h1", BUSYBOX, "always")
    assert [one["id"] for one in record.orders_on("h1")] == [pull_id]
    assert record.orders_on("h2") == []
    record.tell_order(pull_id, state="pulling", phase="pulling", done_bytes=5, total_bytes=None, tries=1)
    order = record.order(pull_id)
    assert (order["host"], order["reference"], order["policy"]) == ("h1", BUSYBOX, "always")
    assert (order["state"], order["done_bytes"], order["total_bytes"]) == ("pulling", 5, None)
    assert (order["digest"], order["error"], order["ended_at"]) == (None, None, None)
    record.tell_order(pull_id, state="done", digest=ONE)
    assert record.orders_on("h1") == []
    assert client.exists(host_key("h1") + ":orders") == 0
    record.tell_order(pull_id, state="failed", error="a late twin")
    assert record.order(pull_id)["state"] == "done"
    assert 0 < client.ttl(f"{PREFIX}pull:{pull_id}") <= 3600
    assert 0 < client.ttl(f"{PREFIX}pull:{pull_id}:notes") <= 3600


def test_to_tell_of_an_order_that_is_gone_makes_none(record, client):
    record.tell_order("pull-0000000000000000", state="done")
    assert client.keys(f"{PREFIX}pull:*") == []


def test_whoever_follows_orders_is_woken_by_each_change_until_all_have_ended(record):
    first, second = (record.write_order(host, BUSYBOX, "missing") for host in ("h1", "h2"))
    record.tell_order(first, state="failed", error="denied")
    follows = record.follow_orders([first, second, "pull-0000000000000000"], block_s=5)
    assert [(one["id"], one["state"]) for one in next(follows)] == [(first, "failed"), (second, "waiting")]
    threading.Timer(0.05, record.tell_order, (second,), {"state": "pulling"}).start()
    assert [one["state"] for one in next(follows)] == ["pulling"]
    record.tell_order(second, state="done", digest=ONE)
    assert [one["digest"] for one in next(follows)] == [ONE]
    assert list(follows) == []


def test_whoever_follows_an_order_that_expires_is_let_go(record, client):
    pull_id = record.write_order("h1", BUSYBOX, "missing")
    follows = record.follow_orders([pull_id], block_s=0.01)
    next(follows)
    assert next(follows) == []
    client.delete(f"{PREFIX}pull:{pull_id}")
    assert list(follows) == [[]]


def test_a_host_with_keys_carries_out_the_orders_of_those_whom_it_knows(
    record, client, broker, tmp_path, caplog
):
    """Whoever can write to the record could else have it fetch and unpack what he likes."""
    for who in ("user-alice", "host-h1"):
        signing.make_key(tmp_path, who)
    alice = signing.Signer.read(tmp_path / "user-alice.key")
    keys = {"host": "h1", "trusted_keys": tmp_path, "signing_key": tmp_path / "host-h1.key"}
    tell = PullMessages(broker.model_copy(update=keys), record)
    good = record.write_order("h1", BUSYBOX, "always", alice)
    assert tell.order(good) == fetcher.Order(BUSYBOX, "always")

    unsigned, changed, copied = (
        record.write_order("h1", BUSYBOX, "always", one) for one in (None, alice, alice)
    )
    client.hset(f"{PREFIX}pull:{changed}", "reference", "docker.io/library/evil:latest")
    client.hset(f"{PREFIX}pull:{copied}", "token", client.hget(f"{PREFIX}pull:{good}", "token"))
    for pull_id in (unsigned, changed, copied):
        assert tell.order(pull_id) is None
        assert record.order(pull_id)["state"] == "failed"
    assert "it is not signed" in record.order(unsigned)["error"]
    assert caplog.text.count("is refused") == 3
    assert [one["id"] for one in record.orders_on("h1")] == [good]


# -- what a host reports -------------------------------------------------------------------------


@pytest.fixture
def of_image(record, tmp_path) -> Journal:
    """The journal of a sandbox that h1 has taken, and whose image is not there."""
    (only,) = enqueue(record, 1, image=BUSYBOX)
    take(record)
    spec = make_spec(args=["true"], network="mynet", image=BUSYBOX)
    return journals.create(tmp_path, only, attempt=1, batch="b-1", spec=spec)


def begin_to_wait(known: Journal) -> None:
    known.mark_begun("image", {"reference": BUSYBOX, "digest": None})
    known.set_facts(pulling=True)


def test_a_journal_that_waits_for_its_image_says_so_until_it_goes_on(record, of_image):
    begin_to_wait(of_image)
    record.report(of_image, "h1")
    row = record.get(of_image.container_id)
    assert (row["state"], row["stage"], row["stages"][0]["state"]) == ("launching", "image", "begun")
    assert go_on(record, slots=1) == ([], [])
    of_image.set_facts(fetched=True, image_digest=ONE)
    record.report(of_image, "h1")
    record.admit("h1", [of_image.container_id], 10)
    assert go_on(record, slots=1) == ([], [of_image.container_id])
    assert record.report(of_image, "h1") == 0  # an old view gives no slot back
    record.admit("h1", [of_image.container_id], 10)
    assert go_on(record, slots=1) == ([], [])
    of_image.set_facts(pulling=None, fetched=None)
    of_image.mark_done("image", {"digest": ONE, "labels": {}, "spec": {}})
    record.report(of_image, "h1")
    (new,) = enqueue(record, 1, start=10)
    assert go_on(record, slots=1) == ([], [])
    assert go_on(record, slots=2) == ([new], [])


def test_a_broker_that_has_lost_all_hears_the_pin_from_the_host_that_runs_it(record, client, of_image):
    """And counts again who waits."""
    begin_to_wait(of_image)
    of_image.set_facts(image_digest=ONE)
    client.flushall()
    record.report(of_image, "h1")
    assert record.pinned("b-1", BUSYBOX) == ONE
    assert record.get(of_image.container_id)["spec"]["image"] == BUSYBOX
    assert client.smembers(host_key("h1") + ":waiting") == {of_image.container_id}
    record.admit("h1", [of_image.container_id], 10)
    assert go_on(record) == ([], [of_image.container_id])
