"""Sandboxes that end: by themselves, when asked, at their time; and those that are started anew."""

import time
from typing import Any

import pytest

from tests.host.system import System

STUBBORN = ("--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
POLITE = ("--", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done")
MANY = 40


def rows(system: System, ids: list[str]) -> list[dict[str, Any]]:
    everything = system.ls()
    return [everything[one] for one in ids]


def is_running(system: System, container_id: str) -> None:
    assert system.wait([container_id], "running") == {container_id: "running"}


def test_many_that_end_by_themselves_are_exited_with_their_code(clean_system: System) -> None:
    """conmon writes the code, an event tells, the undos follow: nobody asks, nothing is left."""
    ids = clean_system.run("--count", str(MANY), "--", "sh", "-c", "exit 7")
    done = clean_system.cli("wait", *ids, "--timeout", "120")
    assert sorted(done.stdout.splitlines()) == sorted(f"{one} 7" for one in ids)
    for row in rows(clean_system, ids):
        assert (row["state"], row["exit_code"], row["reason"]) == ("exited", 7, "exit"), row
        assert row["running_at"] <= row["ended_at"]
    assert clean_system.audit() == []


def test_wait_for_one_ends_with_its_code(clean_system: System) -> None:
    (one,) = clean_system.run("--", "sh", "-c", "exit 42")
    assert clean_system.cli("wait", one, check=False).returncode == 42
    (good,) = clean_system.run("--wait", "--", "true")
    assert clean_system.cli("wait", good).returncode == 0


def test_stop_asks_and_the_program_says_its_own_code(clean_system: System) -> None:
    (one,) = clean_system.run("--wait", *POLITE)
    assert clean_system.cli("stop", one).stdout.split() == [one]
    row = clean_system.show(one)
    assert (row["state"], row["exit_code"], row["reason"]) == ("exited", 3, "stop")
    assert not row["removed"]


def test_who_does_not_listen_is_killed_after_the_grace(clean_system: System) -> None:
    (one,) = clean_system.run("--wait", *STUBBORN)
    before = time.monotonic()
    clean_system.cli("stop", "--time", "1", one)
    assert time.monotonic() - before >= 1
    row = clean_system.show(one)
    assert (row["state"], row["exit_code"], row["reason"]) == ("exited", 137, "stop")


def test_a_ttl_ends_it_and_a_deadline_fails_it(clean_system: System) -> None:
    more = ("--stop-grace", "0.5", *STUBBORN)
    (short,), (late,) = (
        clean_system.run("--ttl", "1", *more),
        clean_system.run("--deadline", "4", *more),
    )
    assert clean_system.wait([short, late], "terminal") == {short: "exited", late: "failed"}
    assert (clean_system.show(short)["reason"], clean_system.show(late)["reason"]) == ("ttl", "deadline")
    assert "has passed" in clean_system.show(late)["error"]["message"]


def test_a_deadline_ends_what_no_host_takes(make_system: Any) -> None:
    """The only host is full: nobody but the sweeper has its clock."""
    system = make_system(SANDBATCH_CAPACITY="1")
    system.start()
    (first,) = system.run("--wait", "--", "sleep", "100")
    (second,) = system.run("--deadline", "2", "--", "true")
    assert system.wait([second], "terminal", 30) == {second: "failed"}
    row = system.show(second)
    assert (row["error"]["stage"], row["reason"], row["host"]) == ("place", "deadline", None)
    assert system.show(first)["state"] == "running"


def test_a_failure_is_started_anew_on_a_new_network(clean_system: System) -> None:
    """A stopped sandbox cannot start again in its netns: each start has an ADD of its own."""
    (one,) = clean_system.run("--restart", "on-failure:2", "--", "sh", "-c", "echo run; exit 5")
    assert clean_system.wait([one], "terminal") == {one: "exited"}
    row = clean_system.show(one)
    assert (row["exit_code"], row["restarts"]) == (5, 2)
    adds = [run for run in row["stages"] if (run["name"], run["verb"]) == ("network", "do")]
    assert [run["state"] for run in adds] == ["done"] * 3
    assert clean_system.audit() == []


def test_rm_between_two_starts_ends_it(clean_system: System) -> None:
    (one,) = clean_system.run("--restart", "on-failure", "--", "false")
    clean_system.wait_until(lambda: clean_system.show(one)["restarts"] >= 2, 30, "second restart")
    clean_system.cli("rm", one)
    assert clean_system.show(one)["state"] == "exited"
    assert clean_system.audit() == []


def test_a_worker_that_dies_while_it_stops_one_is_followed_by_one_that_goes_on(make_system: Any) -> None:
    """The wish, the ttl and the next start are in the journal."""
    system = make_system()
    system.start()
    stopping, ageing = system.run("--wait", *STUBBORN)[0], system.run("--wait", "--ttl", "6", *STUBBORN)[0]
    (failing,) = system.run("--restart", "on-failure:3", "--", "false")
    system.cli("stop", "--no-wait", "--time", "3", stopping)
    system.wait_until(lambda: system.show(stopping)["state"] == "stopping", 10, "wish to stop")
    system.kill_worker()
    system.start()
    assert system.wait([stopping, ageing, failing], "terminal", 60) == dict.fromkeys(
        (stopping, ageing, failing), "exited"
    )
    assert [row["reason"] for row in rows(system, [stopping, ageing, failing])] == ["stop", "ttl", "exit"]
    assert system.show(failing)["restarts"] == 3
    assert system.audit() == []


def test_ends_while_no_worker_looks_are_noted_by_the_next(make_system: Any) -> None:
    system = make_system()
    system.start()
    ids = system.run("--count", "3", "--wait", "--", "sh", "-c", "sleep 2; exit 9")
    system.kill_worker()
    time.sleep(2.5)  # the programs end, and nobody can be told
    system.start()
    assert set(system.wait(ids, "terminal").values()) == {"exited"}
    assert {row["exit_code"] for row in rows(system, ids)} == {9}
    assert system.audit() == []


def test_rm_of_what_has_ended_forgets_it(clean_system: System) -> None:
    (one,) = clean_system.run("--", "true")
    clean_system.wait([one], "terminal")
    clean_system.cli("rm", one)
    assert clean_system.show(one)["removed"]


def test_one_with_rm_is_forgotten_once_it_has_ended(clean_system: System) -> None:
    (one,) = clean_system.run("--rm", "--", "true")
    clean_system.wait([one], "terminal")
    assert clean_system.show(one)["removed"]
    assert one not in clean_system.cli("ls").stdout


@pytest.mark.parametrize(
    "point",
    [
        "message.ended.run.before",
        "message.ended.run.after",
        "message.restart.run.before",
        "journal.attempt.after",
    ],
)
def test_a_worker_killed_while_it_notes_an_end_loses_none_and_starts_none_twice(
    make_system: Any, point: str
) -> None:
    system = make_system(SANDBATCH_ALLOW_FAULTS="1")
    system.start(SANDBATCH_FAULTS=f"{point}:kill:1")
    (one,) = system.run("--restart", "on-failure:1", "--", "sh", "-c", "exit 5")
    system.wait_for_end()
    system.start()
    assert system.wait([one], "terminal") == {one: "exited"}
    row = system.show(one)
    assert (row["exit_code"], row["reason"], row["restarts"]) == (5, "exit", 1)
    assert system.audit() == []
