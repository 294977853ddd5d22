"""Release 0.1.0 beside this one: its hosts and its clients, by the scripts and words that it has."""

import json
from typing import Any

import pytest

from tasks.batch import BatchPlan
from tasks.elder import hand_out
from tasks.keys import PREFIX
from tasks.record import Record
from tasks.rows import read
from tasks.state import State
from tasks.submit import remove, submit
from tasks.sweeper import sweep_fleet
from tasks.whys import explain
from tests.broker.conftest import take
from tests.broker.elder import OLD_QUEUED, WORDS, Elder
from tests.broker.test_submit import arguments, queues
from worker.spec import make_spec

SPEC = make_spec(args=["true"], network="mynet")
IDS = ("sb-00000000000000e1", "sb-00000000000000e2", "sb-00000000000000e3")


@pytest.fixture
def elder(client: Any, record: Record) -> Elder:
    return Elder(client, record)


def placed_on(client: Any, host: str) -> list[str]:
    """Whom the messages in a host's queue are of, the first one first."""
    messages = queues(client).get((f"host.{host}", 9), [])
    return [arguments(one)["message"]["container_id"] for one in reversed(messages)]


# -- its hosts -----------------------------------------------------------------------------------


def test_a_host_of_the_release_before_gets_what_it_has_room_for(sender, record, broker, client, elder):
    elder.beat(capacity=3)
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    for name in ("full", "drained"):  # a share for each of them would take many sweeps
        record.heartbeat(name, {**WORDS["facts"], "pulls": True})
    _, ids = submit(sender, record, broker, [SPEC] * 5)
    assert queues(client) == {}
    sweep_fleet(sender, record)
    assert placed_on(client, "old") == ids[:3]
    assert [elder.claim(one) for one in ids[:3]] == [2, 2, 2]  # its own already
    assert elder.claim(ids[3]) == 1  # what it is sent by a client of its release it takes, room or no room
    hand_out(sender, record)
    assert len(placed_on(client, "old")) == 3
    assert take(record, "new") == ids[4:]


def test_its_launches_end_without_a_word_and_make_room_at_the_next_sweep(
    sender, record, broker, client, elder
):
    elder.beat(slots=1, capacity=100)
    _, ids = submit(sender, record, broker, [SPEC] * 6)
    hand_out(sender, record)
    assert len(record.wishes_on("old")) == 4  # a few at a time: it is asked once in five seconds
    for one in ids[:2]:
        elder.run(one)
    hand_out(sender, record)
    assert [wish.container_id for wish in record.wishes_on("old")] == sorted(ids)


def test_one_that_is_drained_gets_nothing_until_it_is_resumed(sender, record, broker, client, elder):
    elder.beat()
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    pinned = make_spec(args=["true"], network="mynet", host="old")
    record.drain("old", True)
    _, ids = submit(sender, record, broker, [SPEC, pinned])
    hand_out(sender, record)
    assert placed_on(client, "old") == []
    record.drain("old", False)
    hand_out(sender, record)
    assert placed_on(client, "old") == [ids[1], ids[0]]


def test_its_sweep_does_not_stand_in_for_ours(sender, record, broker, client, elder):
    """Whose looks fall just behind each other: it would get nothing, and batches would not end."""
    elder.beat()
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    _, ids = submit(sender, record, broker, [SPEC])
    client.set(f"{PREFIX}sweeper", "1", nx=True, px=5000)  # as it does
    sweep_fleet(sender, record)
    assert placed_on(client, "old") == ids


def test_what_only_the_host_knows_of_takes_room_too(sender, record, broker, client, elder):
    """The broker has lost its data, and the host has not told it yet."""
    elder.beat(capacity=3, sandboxes=2)
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    _, ids = submit(sender, record, broker, [SPEC] * 3)
    hand_out(sender, record)
    assert placed_on(client, "old") == ids[:1]


@pytest.mark.parametrize(
    "facts", [{"not_ready": "full: 3 sandboxes"}, {"pulls": True}, {"networks": ["another"]}]
)
def test_who_is_not_ready_or_pulls_or_has_no_such_network_gets_nothing(
    sender, record, broker, client, elder, facts
):
    elder.beat(**facts)
    submit(sender, record, broker, [SPEC])
    client.delete(*client.keys("sandbatch:mq:*") or ["-"])
    hand_out(sender, record)
    assert queues(client) == {}


def test_it_never_gets_what_it_would_refuse(sender, record, broker, client, elder):
    """A spec of 0.2.0 fails there, as an unknown field; a field that is left out is no reason."""
    elder.beat()
    younger = [
        make_spec(args=["true"], network="mynet", on={"gpu": "true"}),
        make_spec(args=["true"], network="mynet", reschedule=True),
        make_spec(args=["true"], network="mynet", reschedule=True, host="old"),
    ]
    assert {spec.kind for spec in younger} == {"spec/v2"}
    _, ids = submit(sender, record, broker, [*younger, SPEC])
    assert set(json.loads(record.spec(ids[3])[0])) <= set(json.loads(WORDS["spec"]))
    assert client.zrange(OLD_QUEUED, 0, -1) == ids[3:]  # nor does its own sweep find it
    client.delete(*client.keys("sandbatch:mq:*"))
    hand_out(sender, record)
    assert placed_on(client, "old") == ids[3:]
    assert record.get(ids[0])["state"] == "queued"
    assert take(record, "new", labels={"gpu": "true"}) == ids[:2]


def test_its_ends_count_for_their_batch(sender, record, broker, client, elder):
    """Its scripts know no batches; each is counted once, whoever moves it later."""
    elder.beat(capacity=100)
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    plan = BatchPlan(success="50%", max_in_flight=2)
    _, ids = submit(sender, record, broker, [SPEC] * 4, "b", plan)
    hand_out(sender, record)
    elder.run(ids[0])
    hand_out(sender, record)
    assert [record.batch("b")[one] for one in ("released", "up", "ended")] == [2, 1, 0]
    elder.put(ids[0], "exited", exit_code="0", reason="exit")
    elder.put(ids[1], "failed")
    for _ in range(2):
        hand_out(sender, record)
        assert [record.batch("b")[one] for one in ("released", "up", "ended", "good", "bad")] == [
            4,
            2,
            2,
            1,
            1,
        ]
    elder.run(ids[2])
    record.put(ids[2], State.EXITED, 1, {"exit_code": "0", "reason": "exit"})  # it was upgraded meanwhile
    elder.put(ids[3], "failed")
    hand_out(sender, record)
    batch = record.batch("b")
    assert [batch[one] for one in ("up", "ended", "good", "bad", "outcome")] == [4, 4, 2, 2, "succeeded"]
    assert client.smembers(f"{PREFIX}uncounted") == set()


def test_once_it_is_upgraded_its_memory_is_counted(sender, record, broker, client, elder):
    elder.beat()
    elder.enqueue(IDS[0])  # asks for 300 MiB
    elder.claim(IDS[0])
    submit(sender, record, broker, [SPEC])
    hand_out(sender, record)
    assert not client.exists(f"{PREFIX}host:old:memory")
    record.count_memory("old", 7)
    assert sorted(map(int, client.hvals(f"{PREFIX}host:old:memory"))) == [7, 300 << 20]


def test_where_only_such_hosts_live_a_client_asks_them_as_their_own_does(
    sender, record, broker, client, elder
):
    """Clients may be upgraded first, too."""
    elder.beat()
    pinned = make_spec(args=["true"], network="mynet", host="old")
    _, ids = submit(sender, record, broker, [SPEC, pinned, make_spec(args=["true"], reschedule=True)])
    messages = queues(client)
    assert [arguments(one)["message"]["container_id"] for one in messages["launch", 9]] == ids[:1]
    assert placed_on(client, "old") == ids[1:2]
    assert elder.claim(ids[0]) == 1
    elder.run(ids[0])
    elder.put(ids[0], "exited", exit_code="0", reason="exit")
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    hand_out(sender, record)
    assert record.batches()[0]["good"] == 1
    assert take(record, "new") == ids[2:]


# -- its clients ---------------------------------------------------------------------------------


def test_what_its_client_enqueues_stands_in_line_once_a_host_has_heard_of_it(record, elder, client):
    elder.enqueue(IDS[0])
    elder.enqueue(IDS[1], WORDS["pinned_spec"])
    record.offer({one: record.spec(one)[0] for one in IDS[:2]})
    assert client.zrange(OLD_QUEUED, 0, -1) == []
    assert take(record, "h1", memory=200 << 20) == [IDS[1]]
    assert take(record, "h2", memory=400 << 20) == [IDS[0]]


def test_a_message_that_is_lost_or_comes_twice_changes_nothing(record, elder, client):
    for one in IDS:
        elder.enqueue(one, json.dumps({**json.loads(WORDS["spec"]), "memory_bytes": None}))
    record.offer({IDS[0]: record.spec(IDS[0])[0]})
    record.offer_again(0)
    record.offer({IDS[0]: record.spec(IDS[0])[0]})  # its place in the line stays
    assert take(record) == list(IDS)


def test_its_client_cancels_and_removes_what_waits_and_what_runs(sender, record, broker, client, elder):
    """Its `rm` leaves the line as it is, and counts for no batch."""
    record.heartbeat("new", {**WORDS["facts"], "pulls": True})
    _, ids = submit(sender, record, broker, [SPEC] * 3, "b")
    assert elder.put(ids[0], "cancelled", host="") == 1
    assert take(record, "new") == ids[1:]
    hand_out(sender, record)
    assert [record.batch("b")[one] for one in ("ended", "bad")] == [1, 1]


def test_its_records_are_shown_and_removed(sender, record, elder, client):
    elder.enqueue(IDS[0])
    elder.enqueue(IDS[1], WORDS["pinned_spec"])
    elder.enqueue(IDS[2])
    elder.claim(IDS[2])
    rows = {row["id"]: row for row in read(record, with_labels=True)}
    assert rows[IDS[0]]["command"] == "python3 -m http.server"
    assert rows[IDS[0]]["labels"] == {"a": "b"}
    assert [rows[one]["host"] for one in IDS] == [None, "h1", "old"]
    explain(record, list(rows.values()))
    assert [rows[one]["why"] for one in IDS] == ["no host is up", "host h1 is not known", None]
    remove(sender, record, record.get_all(list(IDS)))
    assert [row["state"] for row in record.get_all(list(IDS))] == ["cancelled", "cancelled", "placed"]
    assert [one["headers"]["task"] for one in queues(client)["host.old", 0]] == ["sandbatch.unwind"]
    record.offer_again(0)
    assert take(record) == []


# -- releases to come ----------------------------------------------------------------------------


def test_a_spec_of_an_unknown_kind_waits_for_a_host_that_knows_it(record, elder, cli, heartbeat):
    """Whoever wrote it, and without holding up the rest."""
    elder.enqueue(IDS[0], json.dumps({"kind": "spec/v9", "program": {"words": ["true"]}}))
    elder.enqueue(IDS[1])
    record.offer_again(0)
    assert take(record) == [IDS[1]]
    heartbeat()
    (row,) = cli.json("ls", "--state", "queued")
    assert row["why"] == "no host that is up knows spec/v9 (here has release 0.2.0): upgrade one"
    assert take(record, "h9", kinds=["spec/v1", "spec/v2", "spec/v9"]) == [IDS[0]]
