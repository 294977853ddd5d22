"""What a worker finds when it starts, and later: journals on disk decide what is due."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from worker import journal as journals
from worker import reconcile
from worker.journal import FILE, Journal
from worker.procs import Proc
from worker.reconcile import Due, Later
from worker.settings import Settings
from worker.spec import make_spec

NAMES = ["netns", "network", "bundle", "container", "ready"]
RUNNING = {"report": [1], "watch": [1]}


def made(settings: Settings, number: int, *done: str, begun: str = "", **spec: Any) -> Journal:
    """A journal with these stages done, and one more begun."""
    wanted = make_spec(args=["true"], **spec)
    known = journals.create(settings.sandboxes_dir, f"sb-{number:016x}", attempt=1, batch="b", spec=wanted)
    for name in done:
        known.mark_begun(name)
        known.mark_done(name, {})
    if begun:
        known.mark_begun(begun)
    return known


@contextmanager
def process(*words: str) -> Iterator[None]:
    """A live process whose command line has these words."""
    argv = [sys.executable, "-c", "print(flush=True); input()", *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        started.stdout.readline()  # from now on it has its command line
        yield
        started.communicate(b"\n")


def sentry(settings: Settings, container_id: str) -> AbstractContextManager[None]:
    return process(f"--root={settings.runsc_root}", "boot", container_id)


@contextmanager
def sandbox_process(settings: Settings, container_id: str) -> Iterator[None]:
    """Live processes with the command lines of a sandbox and of its conmon."""
    conmon = process(f"--runtime-arg=--root={settings.runsc_root}", container_id)
    with sentry(settings, container_id), conmon:
        yield


def ids(due: Due) -> dict[str, list[int]]:
    """The numbers of the sandboxes by what is due; empty lists left out."""
    found = {name: [int(one.container_id[3:], 16) for one in known] for name, known in vars(due).items()}
    return {name: numbers for name, numbers in found.items() if numbers}


def again(known: Journal) -> Journal:
    return journals.read(known.folder)


# -- when a worker starts ------------------------------------------------------------------------


def test_a_host_without_sandboxes_has_nothing_due(settings):
    assert ids(reconcile.at_start(settings)) == {}


@pytest.mark.parametrize("begun", ["", *NAMES[:4]])
def test_a_launch_under_way_begins_anew_with_the_next_attempt(settings, begun):
    """Half of a stage is unknown, and the messages of the dead worker must act on nothing."""
    done = NAMES[: NAMES.index(begun)] if begun else []
    known = made(settings, 1, *done, begun=begun)
    due = reconcile.at_start(settings)
    assert ids(due) == {"relaunch": [1]}
    assert due.relaunch[0].attempt == again(known).attempt == 2
    assert again(known).is_stale is bool(begun)
    assert not again(known).is_unwinding


def test_a_stage_that_failed_begins_anew_unless_its_end_was_noted(settings):
    """Its errback was lost with the worker; a new attempt costs less than a failed sandbox."""
    known = made(settings, 1, "netns", begun="network")
    known.mark_failed("network", "no")
    assert ids(reconcile.at_start(settings)) == {"relaunch": [1]}


def test_a_launch_that_takes_every_worker_with_it_is_given_up(settings):
    known = made(settings, 1, "netns", begun="network")
    for attempt in range(2, reconcile.MAX_ATTEMPTS + 1):
        assert ids(reconcile.at_start(settings)) == {"relaunch": [1]}
        assert again(known).attempt == attempt
        again(known).mark_begun("network")
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    facts = again(known).facts
    assert facts["wanted"] == "failed"
    assert facts["error"]["stage"] == "network"
    assert f"{reconcile.MAX_ATTEMPTS} attempts" in facts["error"]["message"]
    assert again(known).attempt == reconcile.MAX_ATTEMPTS


@pytest.mark.parametrize("done", [0, 2, 5])
def test_after_a_reboot_everything_is_undone(settings, monkeypatch, done):
    """The netns is gone with the kernel; leases and rules of the network are files, and need a DEL."""
    known = made(settings, 1, *NAMES[:done])
    monkeypatch.setattr(reconcile, "boot_id", lambda: "another")
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    facts = again(known).facts
    assert facts["wanted"] == "failed"
    assert facts["error"] == {"stage": NAMES[done - 1] if done else "place", "message": "host rebooted"}


def test_what_was_to_end_before_a_reboot_still_ends_as_it_was_to(settings, monkeypatch):
    known = made(settings, 1, "netns")
    known.set_facts(wanted="exited")
    monkeypatch.setattr(reconcile, "boot_id", lambda: "another")
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    assert again(known).facts == {"wanted": "exited"}


def test_an_undo_under_way_goes_on(settings):
    known = made(settings, 1, *NAMES)
    known.set_facts(wanted="exited")
    known.mark_undo_begun("container")
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    assert again(known).attempt == 1


def test_an_end_that_nobody_was_told_of_is_reported(settings):
    known = made(settings, 1)
    known.set_facts(wanted="failed", final="failed")
    assert ids(reconcile.at_start(settings)) == {"report": [1]}


def test_a_sandbox_that_runs_goes_on(settings):
    known = made(settings, 1, *NAMES)
    before = (known.folder / FILE).read_bytes()
    with sandbox_process(settings, known.container_id):
        assert ids(reconcile.at_start(settings)) == RUNNING
    assert (known.folder / FILE).read_bytes() == before


@pytest.mark.parametrize("begun", ["", "ready"])
def test_a_sandbox_that_has_not_answered_is_waited_for_again(settings, begun):
    """The keeper died with the worker; the deadline counts from the first wait."""
    known = made(settings, 1, *NAMES[:4], begun=begun)
    with sandbox_process(settings, known.container_id):
        assert ids(reconcile.at_start(settings)) == {"wait": [1]}
    assert again(known).attempt == 1


@pytest.mark.parametrize("code", [0, 3])
def test_a_sandbox_that_ended_while_no_worker_looked_is_exited(settings, code):
    """conmon has kept its exit code."""
    known = made(settings, 1, *NAMES)
    (settings.exit_dir / known.container_id).write_text(str(code))
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    facts = again(known).facts
    assert (facts["wanted"], facts["exit_code"], facts["reason"]) == ("exited", code, "exit")


def test_a_sandbox_that_was_killed_from_outside_is_failed(settings):
    """No process and no exit code: conmon was killed, too."""
    known = made(settings, 1, *NAMES)
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    facts = again(known).facts
    assert facts["wanted"] == "failed"
    assert facts["error"] == {"stage": "container", "message": "the sandbox was killed from outside"}


def test_a_sandbox_whose_conmon_was_killed_is_failed(settings):
    """Nobody reads what it writes, nor keeps its exit code: seen in a storm, running for ever."""
    known = made(settings, 1, *NAMES)
    with sentry(settings, known.container_id):
        assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    assert again(known).facts["wanted"] == "failed"


@pytest.mark.parametrize("code", [None, 3])
def test_a_sandbox_that_ended_before_it_answered_is_failed(settings, code):
    known = made(settings, 1, *NAMES[:4], begun="ready", ready="tcp:80")
    if code is not None:
        (settings.exit_dir / known.container_id).write_text(str(code))
    assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    error = again(known).facts["error"]
    assert error["stage"] == "ready"
    assert ("exit code 3" if code else "killed from outside") in error["message"]


def test_another_sandboxs_process_keeps_none_alive(settings):
    known = made(settings, 1, *NAMES)
    with sandbox_process(settings, "sb-" + "f" * 16):
        assert ids(reconcile.at_start(settings)) == {"unwind": [1]}
    assert again(known).facts["wanted"] == "failed"


def test_one_that_cannot_be_read_holds_up_no_other(settings):
    (made(settings, 1).folder / FILE).write_text("torn")
    made(settings, 2)
    assert ids(reconcile.at_start(settings)) == {"relaunch": [2]}


def test_one_that_somebody_works_on_is_left_to_a_later_look(settings, monkeypatch):
    """A child of the dead worker that has not died yet."""
    monkeypatch.setattr(reconcile, "TWIN_WAIT_S", 0.05)
    known = made(settings, 1)
    made(settings, 2)
    with journals.locked(settings.sandboxes_dir, known.container_id):
        assert ids(reconcile.at_start(settings)) == {"relaunch": [2]}
    assert again(known).attempt == 1


def test_a_twin_that_dies_in_time_is_waited_for(settings, monkeypatch):
    monkeypatch.setattr(reconcile, "TWIN_WAIT_S", 30)
    known = made(settings, 1)
    with ThreadPoolExecutor() as pool:
        with journals.locked(settings.sandboxes_dir, known.container_id):
            looking = pool.submit(reconcile.at_start, settings)
            with pytest.raises(TimeoutError):
                looking.result(timeout=0.1)
        assert ids(looking.result(timeout=30)) == {"relaunch": [1]}


# -- while it works ------------------------------------------------------------------------------


def written(known: Journal, ago_s: float) -> None:
    """Make the journal's last event so old."""
    at = time.time() - ago_s
    os.utime(known.folder / FILE, (at, at))


@pytest.fixture
def later(settings, monkeypatch) -> Later:
    """On a host where every sandbox has its processes."""

    def processes(root: Path) -> list[Proc]:
        names = os.listdir(settings.sandboxes_dir)
        return [Proc(1, 1, role, name) for name in names for role in ("conmon", "sandbox")]

    monkeypatch.setattr(reconcile, "all_sandbox_processes", processes)
    return Later(settings)


def test_what_was_just_written_is_left_to_its_writer(settings, later):
    made(settings, 1).set_facts(final="failed")
    made(settings, 2, *NAMES)
    assert ids(later.look()) == {}


def test_what_its_writer_did_not_report_is_reported(settings, later):
    """The broker was away, or the process died after its last event."""
    known = made(settings, 1)
    known.set_facts(wanted="failed", final="failed")
    written(known, 3)
    written(made(settings, 2, *NAMES), 3)
    written(made(settings, 3, *NAMES[:4]), 3)
    assert ids(later.look()) == {"report": [1, 2], "watch": [2], "wait": [3]}


def test_a_settled_sandbox_is_not_read_again_until_it_is_written(settings, later, monkeypatch):
    """A host with a thousand quiet sandboxes pays for a thousand `stat`s."""
    known = made(settings, 1, *NAMES)
    written(known, 100)
    assert ids(later.look()) == RUNNING
    later.settle(known.container_id)
    reads, read = [], journals.read
    monkeypatch.setattr(journals, "read", lambda folder: reads.append(folder) or read(folder))
    assert ids(later.look()) == {}
    assert reads == []
    known.set_facts(wanted="exited", final="exited")
    written(known, 50)
    assert ids(later.look()) == {"report": [1]}
    assert reads == [known.folder]


def test_what_was_not_settled_is_due_again(settings, later):
    """The report did not arrive."""
    written(made(settings, 1, *NAMES), 100)
    assert ids(later.look()) == ids(later.look()) == RUNNING


def test_an_event_between_look_and_report_is_not_settled(settings, later):
    """The report was of the view before it."""
    known = made(settings, 1, *NAMES)
    written(known, 100)
    later.look()
    known.set_facts(running_at=journals.now())
    later.settle(known.container_id)
    written(known, 50)
    assert ids(later.look()) == RUNNING


def test_after_the_broker_lost_its_data_everything_is_reported_again(settings, later):
    known = made(settings, 1, *NAMES)
    written(known, 100)
    later.look()
    later.settle(known.container_id)
    later.forget_reports()
    assert ids(later.look()) == RUNNING


def test_settling_a_sandbox_that_the_last_look_did_not_see_settles_nothing(settings, later):
    known = made(settings, 1, *NAMES)
    written(known, 100)
    later.settle(known.container_id)
    assert ids(later.look()) == RUNNING


def test_an_undo_that_stands_still_goes_on(settings, later):
    """Its message was lost, or its process."""
    known = made(settings, 1, "netns")
    known.set_facts(wanted="failed")
    written(known, reconcile.QUIET_S - 2)
    assert ids(later.look()) == {}
    written(known, reconcile.QUIET_S + 1)
    assert ids(later.look()) == {"unwind": [1]}


@pytest.mark.parametrize(("failures", "wait_s"), [(1, 20), (2, 40), (5, 320), (6, 600), (300, 600)])
def test_an_undo_that_keeps_failing_is_tried_ever_more_rarely_but_for_ever(settings, later, failures, wait_s):
    known = made(settings, 1, "netns")
    known.set_facts(wanted="failed")
    for _ in range(failures):
        known.mark_undo_begun("netns")
        known.mark_undo_failed("netns", "busy")
    written(known, wait_s - 2)
    assert ids(later.look()) == {}
    written(known, wait_s + 2)
    assert ids(later.look()) == {"unwind": [1]}


def test_a_launch_whose_message_was_lost_begins_anew(settings, later):
    known = made(settings, 1, "netns", begun="network")
    written(known, settings.stall_s - 5)
    assert ids(later.look()) == {}
    written(known, settings.stall_s + 5)
    due = later.look()
    assert ids(due) == {"relaunch": [1]}
    assert due.relaunch[0].attempt == again(known).attempt == 2
    assert ids(later.look()) == {}  # it has just been written


def test_a_launch_is_given_up_later_as_at_the_start(settings, later):
    known = made(settings, 1, begun="netns")
    known.new_attempt(reconcile.MAX_ATTEMPTS)
    written(known, settings.stall_s + 5)
    assert ids(later.look()) == {"unwind": [1]}
    assert again(known).facts["wanted"] == "failed"


def test_a_launch_that_somebody_works_on_is_left_alone(settings, later):
    """A stage may be longer than we think; its lock says that it lives."""
    known = made(settings, 1, begun="netns")
    written(known, settings.stall_s + 5)
    with journals.locked(settings.sandboxes_dir, known.container_id):
        assert ids(later.look()) == {}
    assert ids(later.look()) == {"relaunch": [1]}


def test_what_cannot_be_read_or_has_ended_holds_up_no_other(settings, later):
    torn = made(settings, 1)
    (torn.folder / FILE).write_text("torn")
    written(torn, 100)
    made(settings, 2).remove()
    written(made(settings, 3, *NAMES), 100)
    (settings.sandboxes_dir / "sb-0000000000000004").mkdir()
    assert ids(later.look()) == {"report": [3], "watch": [3]}


@pytest.mark.parametrize(
    ("content", "kind"),
    [("", "empty"), ("hello\n", "foreign"), ('{"kind":"journal/v9"}\n', "release-journal_v9")],
)
def test_at_the_start_a_journal_that_cannot_be_read_is_set_aside(settings, content, kind):
    """Under a name that says so; the others go on."""
    bad = made(settings, 1)
    (bad.folder / FILE).write_text(content)
    made(settings, 2)
    assert ids(reconcile.at_start(settings)) == {"relaunch": [2]}
    (aside,) = os.listdir(bad.folder)
    assert aside.startswith(f"{FILE}.{kind}-")
    assert ids(reconcile.at_start(settings)) == {"relaunch": [2]}
    assert os.listdir(bad.folder) == [aside]


def test_at_the_start_the_folder_of_one_that_was_being_forgotten_goes(settings):
    """The worker was killed between the removal of its journal and that of its folder."""
    known = made(settings, 1)
    (known.folder / FILE).unlink()
    other = made(settings, 2)
    (other.folder / FILE).rename(other.folder / "something")
    assert ids(reconcile.at_start(settings)) == {}
    assert os.listdir(settings.sandboxes_dir) == [other.container_id]


def test_one_that_somebody_works_on_is_not_set_aside_at_the_start(settings, monkeypatch):
    monkeypatch.setattr(reconcile, "TWIN_WAIT_S", 0.05)
    bad = made(settings, 1)
    (bad.folder / FILE).write_text("")
    with journals.held(settings.sandboxes_dir, bad.container_id):
        assert ids(reconcile.at_start(settings)) == {}
    assert os.listdir(bad.folder) == [FILE]


def test_a_wait_that_was_handed_over_stays_due(settings, later):
    """The keeper tells by a message, which may be lost: whoever asks again costs it nothing."""
    known = made(settings, 1, *NAMES[:4], begun="ready")
    written(known, 100)
    assert ids(later.look()) == {"wait": [1]}
    later.settle(known.container_id)  # its report has arrived
    assert ids(later.look()) == {"wait": [1]}


def test_an_end_that_no_event_told_is_found(settings, later):
    """The message was lost: the exit file is still there."""
    known = made(settings, 1, *NAMES)
    written(known, 100)
    assert ids(later.look()) == RUNNING
    later.settle(known.container_id)
    (settings.exit_dir / known.container_id).write_text("7")
    assert ids(later.look()) == {"ended": [1]}
    assert ids(later.look()) == {"ended": [1]}  # until somebody notes it


def test_a_sandbox_that_was_killed_with_its_conmon_is_found(settings, later, monkeypatch):
    """Nobody writes an exit code for it."""
    known = made(settings, 1, *NAMES)
    written(known, 100)
    monkeypatch.setattr(reconcile, "all_sandbox_processes", lambda root: [])
    assert ids(later.look()) == {**RUNNING, "ended": [1]}


@pytest.mark.parametrize("wish", ["wanted", "restart_at"])
def test_one_whose_end_is_noted_is_not_found_again(settings, later, monkeypatch, wish):
    known = made(settings, 1, *NAMES)
    known.set_facts(**{wish: journals.now()})
    written(known, 5)
    monkeypatch.setattr(reconcile, "all_sandbox_processes", lambda root: [])
    (settings.exit_dir / known.container_id).write_text("7")
    assert "ended" not in ids(later.look())


def test_a_start_that_is_overdue_is_asked_for_again(settings, later):
    """The keeper's message was lost."""
    known = made(settings, 1, *NAMES)
    known.set_facts(restart_at="2020-01-01T00:00:00.000Z")
    written(known, 5)
    assert ids(later.look()) == {"report": [1], "restart": [1]}
    later.settle(known.container_id)
    assert ids(later.look()) == {"report": [1], "restart": [1]}


def test_a_start_to_come_is_left_to_the_keeper(settings, later):
    known = made(settings, 1, *NAMES)
    known.set_facts(restart_at="2999-01-01T00:00:00.000Z")
    written(known, 5)
    assert ids(later.look()) == {"report": [1], "watch": [1]}
    assert ids(reconcile.at_start(settings)) == {"report": [1], "watch": [1]}


def test_a_worker_that_dies_between_two_runs_costs_no_attempt_too_many(settings):
    """A restart is an attempt as well: only those that were lost count."""
    known = made(settings, 1, *NAMES)
    known.set_facts(restarts=20)
    known.new_attempt(21)
    assert ids(reconcile.at_start(settings)) == {"relaunch": [1]}
    assert again(known).attempt == 22


# -- images --------------------------------------------------------------------------------------


def waits_for_image(settings: Settings, number: int, **facts: Any) -> Journal:
    known = made(settings, number, begun="image", image="docker.io/library/busybox:latest")
    known.set_facts(pulling=True, **facts)
    return known


def test_at_the_start_what_waits_for_an_image_goes_to_the_fetcher_again(settings):
    """Also if the image is here by now: only so it waits for a slot, as the others do."""
    waits_for_image(settings, 1)
    waits_for_image(settings, 2, fetched=True, image_digest="sha256:0")
    due = reconcile.at_start(settings)
    assert ids(due) == {"fetch": [1, 2]}
    assert [one.attempt for one in due.fetch] == [2, 2]  # the messages of the dead worker act on nothing
    assert all(again(one).waits_for_image for one in due.fetch)


def test_a_pull_may_take_longer_than_a_launch_may_stand_still(settings, later):
    """And its message may be lost: it stays due, until its pull has ended."""
    known = waits_for_image(settings, 1)
    written(known, settings.stall_s + 1)
    for _ in range(2):
        assert ids(later.look()) == {"fetch": [1]}
    known.set_facts(fetched=True)
    written(known, settings.stall_s + 1)
    for _ in range(2):
        assert ids(later.look()) == {"admit": [1]}
    assert again(known).attempt == 1


def test_a_launch_that_has_its_image_and_stands_still_begins_anew(settings, later):
    known = waits_for_image(settings, 1)
    known.set_facts(pulling=None)
    known.mark_done("image", {"spec": {}})
    written(known, settings.stall_s + 1)
    assert ids(later.look()) == {"relaunch": [1]}
