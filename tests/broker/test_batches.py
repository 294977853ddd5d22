"""Batches: counters, rules, waves; kept by the scripts that move the sandboxes."""

import time

import pytest

from tasks.batch import BatchPlan
from tasks.keys import PREFIX
from tasks.record import Record
from tasks.scripts import BROKEN
from tasks.state import State
from tasks.submit import cancel, remove, submit
from tests.broker.conftest import take
from tests.broker.test_submit import queues
from worker.errors import BadInput
from worker.spec import make_spec

SPEC = make_spec(args=["true"], network="mynet")


@pytest.fixture
def start(sender, record, broker):
    """Submit a batch `b` of so many; its ids."""

    def submitted(count: int, **plan) -> list[str]:
        return submit(sender, record, broker, [SPEC] * count, batch="b", plan=BatchPlan(**plan))[1]

    return submitted


def run(record: Record, container_id: str) -> None:
    for state in (State.LAUNCHING, State.RUNNING):
        assert record.put(container_id, state, 1, {}) == 1


def end(record: Record, container_id: str, code: int = 0, reason: str = "exit") -> int:
    return record.put(container_id, State.EXITED, 1, {"exit_code": str(code), "reason": reason})


def counters(record: Record, *names: str) -> tuple[int, ...]:
    return tuple(record.batch("b")[name] for name in names)


def outcome(record: Record) -> str | None:
    return record.batch("b")["outcome"]


# -- counters ------------------------------------------------------------------------------------


def test_each_sandbox_is_counted_once_whatever_way_it_goes(start, record):
    a, b, c, d = start(4)
    assert counters(record, "total", "released", "up", "ended") == (4, 4, 0, 0)
    take(record)
    run(record, a)
    assert counters(record, "up", "ended") == (1, 0)
    end(record, a)
    record.put(b, State.FAILED, 1, {})
    run(record, c)
    record.put(c, State.EXITED, 1, {"exit_code": "1", "reason": "exit"})
    record.put(d, State.LAUNCHING, 1, {})
    assert counters(record, "up", "ended", "good", "bad") == (3, 3, 1, 2)
    record.put(d, State.UNDOING, 1, {})
    record.put(d, State.CANCELLED, 1, {})
    assert counters(record, "up", "ended", "good", "bad") == (4, 4, 1, 3)


def test_a_report_that_comes_twice_counts_once(start, record):
    (a,) = start(1)
    take(record)
    run(record, a)
    end(record, a)
    end(record, a)
    assert counters(record, "up", "ended", "good") == (1, 1, 1)


def test_a_restart_is_not_another_sandbox(start, record):
    (a,) = start(1)
    take(record)
    run(record, a)
    record.put(a, State.RESTARTING, 1, {})
    record.put(a, State.LAUNCHING, 2, {})
    record.put(a, State.RUNNING, 2, {})
    assert counters(record, "up", "ended") == (1, 0)


@pytest.mark.parametrize("reason", ["stop", "ttl", "rm"])
def test_one_that_was_ended_on_purpose_has_succeeded(start, record, reason):
    (a,) = start(1)
    take(record)
    run(record, a)
    end(record, a, 143, reason)
    assert counters(record, "good", "bad") == (1, 0)


@pytest.mark.parametrize("reason", ["oom", "deadline", "lost"])
def test_one_that_was_killed_has_not(start, record, reason):
    (a,) = start(1)
    take(record)
    run(record, a)
    end(record, a, 137, reason)
    assert counters(record, "good", "bad") == (0, 1)


# -- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("success", "good", "expected"),
    [
        ("", 4, "succeeded"), ("", 3, "failed"), ("all", 3, "failed"), ("3", 3, "succeeded"),
        ("3", 2, "failed"), ("50%", 2, "succeeded"), ("51%", 2, "failed"), ("0", 0, "succeeded"),
    ],
)  # fmt: skip
def test_the_outcome_is_judged_by_the_rule_once_all_have_ended(start, record, success, good, expected):
    ids = start(4, success=success)
    take(record)
    for number, one in enumerate(ids):
        assert outcome(record) is None
        run(record, one)
        end(record, one, 0 if number < good else 1)
    assert outcome(record) == expected
    assert record.batch("b")["ended_at"]


def test_an_outcome_is_told(start, record):
    (a,) = start(1)
    take(record)
    run(record, a)
    mark = record.last_event()
    end(record, a)
    told = [event for _, event in record.follow(mark, 0.1)]
    assert [(event["id"], event["batch"], event["state"]) for event in told] == [
        (a, "b", "exited"),
        ("", "b", "succeeded"),
    ]


@pytest.mark.parametrize(
    "plan",
    [
        {"success": "most"}, {"success": "101%"}, {"success": "-1"}, {"max_in_flight": 0}, {"waves": (1, 0)},
    ],
)  # fmt: skip
def test_a_plan_without_sense_is_refused(plan):
    with pytest.raises(BadInput):
        BatchPlan(**plan)


def test_more_successes_than_sandboxes_are_refused_before_anything_is_written(start, record):
    with pytest.raises(BadInput, match="there are 2 sandboxes"):
        start(2, success="3")
    assert record.batch("b") is None
    assert record.ids() == []


def test_a_batch_that_is_there_gets_no_other_rule(start):
    start(1)
    with pytest.raises(BadInput, match="there is one already"):
        start(1, success="all")


# -- how it goes ---------------------------------------------------------------------------------


def test_no_more_than_max_in_flight_are_out_at_a_time(start, record):
    ids = start(5, max_in_flight=2)
    assert record.batch("b")["held"] == 3
    assert take(record) == ids[:2]
    assert take(record) == []
    run(record, ids[0])
    assert take(record) == []
    end(record, ids[0])
    assert take(record) == ids[2:3]
    record.put(ids[1], State.FAILED, 1, {})
    assert take(record) == ids[3:4]


def test_a_wave_goes_when_all_before_it_are_up_and_the_last_size_repeats(start, record):
    ids = start(8, waves=(1, 2))
    assert take(record) == ids[:1]
    run(record, ids[0])
    assert take(record) == ids[1:3]
    run(record, ids[1])
    assert take(record) == []
    record.put(ids[2], State.FAILED, 1, {})
    assert take(record) == ids[3:5]
    for one in ids[3:5]:
        run(record, one)
    assert take(record) == ids[5:7]
    for one in ids[5:7]:
        run(record, one)
    assert take(record) == ids[7:]


def test_fail_fast_tells_once_the_rule_cannot_be_met(start, record, sender):
    ids = start(4, success="75%", fail_fast=True)
    take(record)
    assert record.put(ids[0], State.FAILED, 1, {}) == 1
    assert record.put(ids[1], State.FAILED, 1, {}) == BROKEN
    assert record.broken_batches() == ["b"]  # should its host die now, the sweep does it
    cancel(sender, record, "b")
    assert record.broken_batches() == []
    for one in ids[2:]:
        record.put(one, State.UNDOING, 1, {})
        record.put(one, State.CANCELLED, 1, {})
    assert outcome(record) == "failed"  # nobody has cancelled it


# -- cancel --------------------------------------------------------------------------------------


def test_cancel_drops_what_waits_and_undoes_what_runs(start, record, sender, client):
    ids = start(4, max_in_flight=2)
    assert take(record, slots=1) == ids[:1]
    cancel(sender, record, "b")
    assert [row["state"] for row in record.get_all(ids)] == ["placed", *["cancelled"] * 3]
    ((where, (message,)),) = queues(client).items()
    assert where == ("host.h1", 0)
    assert message["headers"]["task"] == "sandbatch.unwind"
    assert take(record) == []
    record.put(ids[0], State.UNDOING, 1, {})
    record.put(ids[0], State.CANCELLED, 1, {})
    assert outcome(record) == "cancelled"
    assert counters(record, "total", "ended", "bad") == (4, 4, 4)


def test_what_a_batch_holds_back_can_be_removed_by_itself(start, record, sender):
    ids = start(4, max_in_flight=1)
    remove(sender, record, record.get_all(ids[1:2]))
    assert record.get(ids[1])["state"] == "cancelled"
    take(record)
    run(record, ids[0])
    end(record, ids[0])
    assert take(record) == ids[2:3]


def test_one_that_has_ended_as_a_whole_is_kept_for_a_day(start, record, client):
    (a,) = start(1)
    assert client.ttl(f"{PREFIX}batch:b") == -1
    take(record)
    run(record, a)
    end(record, a)
    assert 0 < client.ttl(f"{PREFIX}batch:b") <= 24 * 3600
    assert 0 < client.ttl(f"{PREFIX}batch:b:ids") <= 24 * 3600


# -- a client that dies --------------------------------------------------------------------------


def test_a_batch_whose_client_died_half_way_is_judged_without_the_rest(start, record, client):
    """Until it is known that all are written, no number of ends is an end."""
    (a,) = start(1)
    client.hset(f"{PREFIX}batch:b", "open", "1")
    client.zadd(f"{PREFIX}open", {"b": time.time() - 100})
    take(record)
    run(record, a)
    end(record, a)
    assert outcome(record) is None
    assert record.open_batches(60) == ["b"]
    record.close_batch("b")
    assert record.open_batches(0) == []
    assert outcome(record) == "succeeded"
