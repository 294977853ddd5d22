"""Hosts that pull, while they fail, or what they pull from does: never too many, none lost, none twice."""

import time
from datetime import datetime

from tests.hosts.fleet import Fleet
from worker.spec import make_spec

SLEEP = ("--", "sleep", "300")


def on(fleet: Fleet, ids: list[str]) -> set[str]:
    rows = fleet.rows()
    return {rows[one]["host"] for one in ids}


def test_a_broker_that_forgets_while_a_host_is_full_does_not_overfill_it(clean_fleet):
    """It counts nothing at first; the host takes no more before it has told of all that it has."""
    fleet = clean_fleet
    full = fleet.run("--count", "8", "--host", "h1", "--wait", *SLEEP)

    fleet.restart_broker(forget=True)

    # Not by the command line, which refuses a host that nobody knows at the moment.
    more = fleet.submit([make_spec(args=["sleep", "300"], host="h1")] * 2)
    fleet.wait_until(lambda: set(full) <= set(fleet.rows()), 30, "records again")
    others = fleet.run("--count", "2", "--wait", *SLEEP)
    assert on(fleet, others) <= {"h2", "h3"}
    assert fleet.live()["h1"] == 8
    rows = fleet.rows()
    assert {rows[one]["state"] for one in full} == {"running"}
    assert {rows[one]["state"] for one in more} == {"queued"}
    fleet.cli("rm", *full[:2])
    assert set(fleet.wait(more, "running").values()) == {"running"}


def test_a_broker_restarted_in_the_middle_of_a_batch_loses_and_doubles_nothing(clean_fleet):
    """What was taken, what was about to be and what waits go on."""
    fleet = clean_fleet
    ids = fleet.run("--count", "18", *SLEEP)
    fleet.wait_until(lambda: sum(fleet.live().values()) > 2, 60, "some of them")
    fleet.restart_broker()
    assert set(fleet.wait(ids, "running", 90).values()) == {"running"}
    assert sum(fleet.live().values()) == 18
    assert fleet.audits() == []


def test_a_host_that_is_cut_off_with_work_it_has_not_begun_begins_it_later(clean_fleet):
    """Its messages wait at the broker; nobody else may have what it has taken."""
    fleet = clean_fleet
    mark = fleet.record.last_event()
    ids = fleet.run("--count", "6", "--host", "h1", *SLEEP)
    fleet.wait_until(lambda: any(one["state"] == "placed" for one in fleet.events(mark)), 20, "first take")
    fleet.cut("h1")
    others = fleet.run("--count", "2", "--wait", *SLEEP)
    assert on(fleet, others) <= {"h2", "h3"}
    fleet.join("h1")
    assert set(fleet.wait(ids, "running", 90).values()) == {"running"}
    assert fleet.live()["h1"] == 6


def test_what_is_removed_while_hosts_take_it_ends(clean_fleet):
    """Whichever comes first, the mark or the take."""
    fleet = clean_fleet
    ids = fleet.run("--count", "24", *SLEEP)
    fleet.cli("rm", *ids)
    assert set(fleet.wait(ids, "terminal").values()) <= {"cancelled", "exited"}
    fleet.wait_until(lambda: not any(fleet.live().values()), 20, "end of all")
    assert fleet.audits() == []


def test_a_host_with_less_capacity_than_sandboxes_takes_none_until_it_has_room(clean_fleet):
    """Somebody has lowered it, and started the worker anew: what runs there goes on."""
    fleet, host = clean_fleet, clean_fleet.hosts["h1"]
    old = fleet.run("--count", "4", "--host", "h1", "--wait", *SLEEP)
    fleet.stop_worker("h1")
    before = host.env["SANDBATCH_CAPACITY"]
    host.env["SANDBATCH_CAPACITY"] = "3"
    fleet.start_worker("h1")
    (new,) = fleet.run("--host", "h1", *SLEEP)
    fleet.cli("rm", old[0])
    fleet.run("--wait", *SLEEP)
    assert (fleet.rows()[new]["state"], fleet.live()["h1"]) == ("queued", 3)
    fleet.cli("rm", old[1])
    assert fleet.wait([new], "running") == {new: "running"}
    fleet.stop_worker("h1")
    host.env["SANDBATCH_CAPACITY"] = before
    fleet.start_worker("h1")


def test_a_drained_host_takes_nothing_and_once_resumed_takes_at_once(clean_fleet):
    """Resuming rings its bell: it need not wait for its next look."""
    fleet = clean_fleet
    fleet.drain("h1")
    (pinned,) = fleet.run("--host", "h1", "--", "true")
    others = fleet.run("--count", "4", "--wait", *SLEEP)
    assert on(fleet, others) <= {"h2", "h3"}
    assert fleet.rows()[pinned]["state"] == "queued"
    mark, resumed_s = fleet.record.last_event(), time.time()
    fleet.resume("h1")
    assert fleet.wait([pinned], "terminal") == {pinned: "exited"}
    placed = next(one for one in fleet.events(mark) if (one["id"], one["state"]) == (pinned, "placed"))
    assert datetime.fromisoformat(placed["t"]).timestamp() - resumed_s < 2
