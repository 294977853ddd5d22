"""What a lost host had is launched elsewhere where that was asked for: once, counted once, undone there."""

import json
import threading
import time
from typing import Any

import pytest

from cli.away import Away
from cli.batch_wait import Progress
from tasks.batch import BatchPlan
from tasks.connection import connect
from tasks.lost import MISSED_SWEEPS, forget_host, sweep_lost
from tasks.record import Record
from tasks.state import State
from tasks.submit import submit
from tasks.sweeper import sweep_host
from tests.broker.conftest import take
from tests.broker.test_hosts import silence
from tests.broker.test_submit import arguments, queues
from worker import journal as journals
from worker.spec import make_spec

MOVES = make_spec(args=["sleep", "60"], labels={"team": "red"}, network="mynet", reschedule=True)
STAYS = make_spec(args=["sleep", "60"], network="mynet")


@pytest.fixture
def on_h1(record: Record, heartbeat: Any, sender: Any, broker: Any) -> list[str]:
    """Three of a batch on h1: two that move, of which the first runs, and one that stays and runs."""
    heartbeat("h1", pulls=True)
    _, ids = submit(sender, record, broker, [MOVES, MOVES, STAYS], "b-1", BatchPlan(success="all"))
    assert sorted(take(record, "h1")) == sorted(ids)
    heartbeat("h2", pulls=True)  # only now: h1 would have taken its share
    for number in (0, 2):
        assert record.put(ids[number], State.RUNNING, 1, {}) == 1
    return ids


def sweep(record: Record, times: int = MISSED_SWEEPS) -> None:
    for _ in range(times):
        sweep_lost(record)


def successors(record: Record, ids: list[str]) -> list[str | None]:
    return [row["replaced_by"] for row in record.get_all(ids)]


def test_what_asked_for_it_is_launched_elsewhere_under_a_new_id(record, on_h1, client):
    silence(client, "h1")
    sweep(record)
    first, second, third = successors(record, on_h1)
    assert third is None
    old, new = record.get_all([on_h1[0], first])
    assert (old["state"], old["last_state"], old["replaces"]) == ("unknown", "running", None)
    assert (new["state"], new["replaces"], new["host"], new["attempt"]) == ("queued", on_h1[0], None, 1)
    assert (new["batch"], new["labels"], new["spec"]) == ("b-1", {"team": "red"}, old["spec"])
    assert set(take(record, "h2")) == {first, second}
    assert record.put(first, State.RUNNING, 1, {}) == 1


def test_a_host_that_has_missed_a_sweep_or_two_is_not_given_up(record, on_h1, client, heartbeat):
    """After the broker was away all hosts look lost, until their next heartbeat."""
    silence(client, "h1")
    sweep(record, MISSED_SWEEPS - 1)
    heartbeat("h1", pulls=True)
    sweep(record, 1)
    silence(client, "h1")
    sweep(record, MISSED_SWEEPS - 1)
    assert successors(record, on_h1) == [None, None, None]
    sweep(record, 1)
    assert successors(record, on_h1)[0] is not None


@pytest.mark.parametrize("left", ["by its worker's stop", "and came back"])
def test_what_is_not_lost_stays(record, on_h1, client, heartbeat, left):
    if left == "and came back":
        silence(client, "h1")
        sweep(record, MISSED_SWEEPS - 1)
        heartbeat("h1", pulls=True)
    else:
        record.leave("h1")
    sweep(record)
    assert successors(record, on_h1) == [None, None, None]
    assert not record.reschedule(on_h1[0], "sb-00000000000000ff", "h1") or left != "and came back"


def test_what_ends_or_is_asked_to_end_is_not_begun_anew(record, sender, broker, heartbeat, client):
    heartbeat("h1", pulls=True)
    _, ids = submit(sender, record, broker, [MOVES] * 5)
    take(record, "h1")
    record.put(ids[0], State.EXITED, 1, {"exit_code": "0"})
    record.put(ids[1], State.STOPPING, 1, {})
    record.mark_removed([ids[2]])
    record.mark_stopped({ids[3]: 10.0})
    record.cancel_all([ids[4]])
    silence(client, "h1")
    sweep(record)
    assert successors(record, ids) == [None] * 5


def test_nothing_is_begun_anew_in_a_batch_that_is_being_cancelled(record, on_h1, client):
    """Whoever cancels has read which ids there are, and marks them one by one."""
    record.stop_batch("b-1")
    silence(client, "h1")
    sweep(record)
    assert successors(record, on_h1) == [None, None, None]


def test_two_sweepers_make_one(record, on_h1, broker, client):
    silence(client, "h1")
    sweep(record, MISSED_SWEEPS - 1)
    answers: list[bool] = []
    both = threading.Barrier(2)

    def go(number: int) -> None:
        with connect(broker) as connection:
            other = Record(connection)
            both.wait()
            answers.append(other.reschedule(on_h1[0], f"sb-00000000000000f{number}", "h1"))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(answers) == [False, True]
    assert len(record.ids()) == 4


def test_the_batch_counts_the_new_one_in_place_of_the_old(record, on_h1, client, heartbeat):
    """Also where the old one ends after all: the host was cut off, not dead."""
    silence(client, "h1")
    sweep(record)
    first, second, _ = successors(record, on_h1)
    assert record.batch_ids("b-1") == [first, second, on_h1[2]]
    assert set(take(record, "h2")) == {first, second}
    heartbeat("h1", pulls=True)
    record.put(on_h1[0], State.CANCELLED, 1, {"reason": "rescheduled"})
    record.put(on_h1[1], State.FAILED, 1, {})
    before = record.batch("b-1")
    assert (before["total"], before["up"], before["ended"], before["bad"]) == (3, 2, 0, 0)
    for one in (first, second, on_h1[2]):
        record.put(one, State.RUNNING, 1, {})
        record.put(one, State.EXITED, 1, {"exit_code": "0"})
    after = record.batch("b-1")
    assert (after["total"], after["up"], after["ended"], after["good"]) == (3, 3, 3, 3)
    assert after["outcome"] == "succeeded"


def test_max_in_flight_stays_as_it_was(record, sender, broker, heartbeat, client):
    """The new one takes the place of the old, also among those that are released."""
    heartbeat("h1", pulls=True)
    _, ids = submit(sender, record, broker, [MOVES] * 3, "b-1", BatchPlan(max_in_flight=1))
    assert take(record, "h1") == ids[:1]
    silence(client, "h1")
    sweep(record)
    (new,) = take(record, "h2")
    assert record.batch("b-1")["held"] == 2
    record.put(new, State.FAILED, 1, {})
    assert take(record, "h2") == [ids[1]]


def test_a_deadline_goes_with_it(record, sender, broker, heartbeat, client):
    heartbeat("h1", pulls=True)
    spec = MOVES.model_copy(update={"deadline_at": "2020-01-01T00:00:00.000Z"})
    _, (old,) = submit(sender, record, broker, [spec])
    take(record, "h1")
    silence(client, "h1")
    sweep(record)
    (new,) = successors(record, [old])
    assert [one for one, _, _ in record.overdue()] == [new]


# -- when the host returns -------------------------------------------------------------------------


def journal(folder: Any, container_id: str, spec: Any = MOVES) -> None:
    journals.create(folder, container_id, attempt=1, batch="b-1", spec=spec)


def asked(client: Any) -> list[tuple[str, str, str | None]]:
    """The unwinds on the queue of h1: id, final state, reason."""
    here = [messages for (queue, _), messages in queues(client).items() if queue == "host.h1"]
    unwinds = [one for messages in here for one in map(arguments, messages) if "final" in one]
    return [(one["message"]["container_id"], one["final"], one.get("reason")) for one in unwinds]


def test_the_host_undoes_what_runs_elsewhere_by_now(record, on_h1, client, heartbeat, sender, tmp_path):
    for one in (on_h1[0], on_h1[2]):
        journal(tmp_path, one)
    silence(client, "h1")
    sweep(record)
    heartbeat("h1", pulls=True)
    sweep_host(sender, record, "h1", tmp_path, is_first=True)
    assert asked(client) == [(on_h1[0], "cancelled", "rescheduled")]
    second = record.get(on_h1[1])
    assert (second["state"], second["reason"]) == ("cancelled", "rescheduled"), "it never began there"
    assert not record.is_wanted(on_h1[0])


def test_the_host_undoes_what_was_forgotten_with_it(record, on_h1, client, heartbeat, sender, tmp_path):
    """Nobody would end what the record has as ended, and every audit would be clean."""
    journal(tmp_path, on_h1[2], STAYS)
    silence(client, "h1")
    assert forget_host(record, "h1")
    heartbeat("h1", pulls=True)
    sweep_host(sender, record, "h1", tmp_path, is_first=True)
    assert asked(client) == [(on_h1[2], "cancelled", "lost")]


def test_a_wait_goes_on_with_the_new_one(record, on_h1, client, capsys, monkeypatch):
    monkeypatch.setattr("cli.away.LOOK_S", 0)
    away = Away(record, follows=True)
    states = away.begin([on_h1[0], on_h1[2]])
    silence(client, "h1")
    away.look(states)
    assert states == {on_h1[0]: "unknown", on_h1[2]: "unknown"}
    sweep(record)
    away.look(states)
    first = successors(record, on_h1)[0]
    assert states == {on_h1[2]: "unknown", first: "queued"}
    assert f"{first} is launched in its place" in capsys.readouterr().err


def test_a_wait_goes_on_with_the_new_one_though_the_old_has_ended(record, on_h1, client, heartbeat):
    """The host is back before the next look, and what it undoes at once has an event."""
    away, late = Away(record, follows=True), Away(record, follows=True)
    silence(client, "h1")
    states = away.begin([on_h1[0]])
    assert states == {on_h1[0]: "unknown"}
    sweep(record)
    heartbeat("h1", pulls=True)
    record.put(on_h1[0], State.CANCELLED, 1, {})
    states[on_h1[0]] = "cancelled"  # as the event says
    away.look(states)
    first = successors(record, on_h1)[0]
    assert states == {first: "queued"}
    assert late.begin([on_h1[0]]) == {first: "queued"}
    assert Away(record, follows=False).begin([on_h1[0]]) == {on_h1[0]: "cancelled"}


def test_a_wait_for_a_batch_says_which_host_is_lost(cli, record, on_h1, client):
    silence(client, "h1")
    done = cli("wait", "--batch", "b-1", "--timeout", "0.1")
    assert done.returncode == 1
    assert "host h1 is lost since" in done.stderr
    assert "3 sandboxes waited for, until it returns" in done.stderr


def test_a_wait_for_a_batch_goes_on_with_the_new_ones(record, on_h1, client, heartbeat, monkeypatch):
    """The old ones count no more, whatever becomes of them."""
    monkeypatch.setattr("cli.away.LOOK_S", 0)
    away = Away(record, follows=True)
    progress = Progress("b-1", "running", away.begin(on_h1), is_counted=True)
    silence(client, "h1")
    assert progress.look(away)
    assert (progress.counts["unknown"], progress.reached) == (3, 0)
    sweep(record)
    heartbeat("h1", pulls=True)
    assert progress.look(away)
    assert not progress.hear({"id": on_h1[0], "batch": "b-1", "state": "cancelled"})
    first, second, _ = successors(record, on_h1)
    assert progress.states == {first: "queued", second: "queued", on_h1[2]: "running"}
    assert (progress.counts["queued"], progress.counts["running"], progress.reached) == (2, 1, 1)


def test_ls_and_show_say_what_became_of_it(cli, record, on_h1, client):
    silence(client, "h1")
    sweep(record)
    first = successors(record, on_h1)[0]
    rows = {row["id"]: row for row in cli.json("ls")}
    assert rows[on_h1[0]]["replaced_by"] == first
    assert rows[first]["replaces"] == on_h1[0]
    assert f"replaced by {first}" in cli("ls").stdout
    assert first in cli("show", on_h1[0]).stdout
    assert on_h1[0] in cli("show", first).stdout


@pytest.mark.parametrize("options", [("--host", "h1"), ("--attach",)])
def test_what_cannot_move_is_not_to_be_moved(cli, record, on_h1, options):
    done = cli("run", "--reschedule", *options, "--", "true")
    assert done.returncode == 2
    assert "--reschedule" in done.stderr
    assert len(record.ids()) == 3


def test_the_new_record_is_as_one_that_was_enqueued(record, on_h1, client):
    """A field that the script forgets would be missed long after."""
    silence(client, "h1")
    sweep(record)
    new = client.hgetall(f"sandbatch:sb:{successors(record, on_h1)[1]}")
    record.enqueue("b-2", [("sb-00000000000000c1", MOVES)])
    fresh = client.hgetall("sandbatch:sb:sb-00000000000000c1")
    assert set(new) - set(fresh) == {"replaces"}
    assert set(fresh) <= set(new)
    assert json.loads(new["spec"])["reschedule"] is True
    assert time.time() - client.zscore("sandbatch:sandboxes", new["id"]) < 10
