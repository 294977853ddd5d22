"""kill -9 of the worker at each point of a life; a new worker: running or ended, nothing left."""

import time

import pytest

from tests.host.system import SERVER, System

TAKEN_UP_S = 15.0
STAGES = ("netns", "network", "bundle", "container")
LAUNCHING = [
    "message.place.publish.before",
    "message.place.publish.after",
    "message.place.run.before",
    "journal.begun.netns.before",
    "message.netns.publish.before",
    "message.netns.publish.after",
    "message.place.run.after",
    *(f"journal.begun.{stage}.after" for stage in STAGES),
    *(f"stage.{stage}.do.after" for stage in STAGES),
    *(f"journal.done.{stage}.after" for stage in STAGES),
    "conmon.create.after",
    "journal.begun.ready.after",
    "message.ready.publish.before",
    "message.ready.run.before",
    "journal.done.ready.after",
]
REMOVING = [
    "message.unwind.run.before",
    "journal.facts.after",
    "message.undo.container.publish.before",
    *(f"journal.undo.{stage}.after" for stage in STAGES),
    *(f"stage.{stage}.undo.after" for stage in STAGES),
    *(f"journal.undone.{stage}.after" for stage in STAGES),
]


@pytest.fixture
def killed(make_system):
    """A system whose worker is killed at the points given, one after the other."""
    system = make_system(SANDBATCH_ALLOW_FAULTS="1")
    system.start()
    return system


def restart(system: System, faults: str = "") -> float:
    """A new worker, with the next faults; the moment of its start."""
    if faults:
        system.stop()
    else:
        system.wait_for_end()
    system.env["SANDBATCH_FAULTS"] = faults
    began = time.monotonic()
    system.start()
    return began


@pytest.mark.timeout(600)
def test_killed_while_launching(killed: System):
    """Within 15 s of the new worker's start the sandbox is running or failed, and nothing else is there."""
    for point in LAUNCHING:
        restart(killed, f"{point}:kill")
        (container_id,) = killed.run(*SERVER)
        began = restart(killed)
        state = killed.wait([container_id], "running", TAKEN_UP_S)[container_id]
        assert state in ("running", "failed"), f"{point}: {state}\n{killed.log()}"
        assert time.monotonic() - began < TAKEN_UP_S, point
        assert killed.audit() == [], point
        killed.cli("rm", container_id)
        assert killed.audit() == [], point


@pytest.mark.timeout(600)
def test_killed_while_removing(killed: System):
    """The undo goes on where it stood."""
    for point in REMOVING:
        (container_id,) = killed.run("--wait", *SERVER)
        restart(killed, f"{point}:kill")
        killed.cli("rm", "--no-wait", container_id)
        restart(killed)
        states = killed.wait([container_id], "terminal", TAKEN_UP_S)
        assert states == {container_id: "exited"}, f"{point}: {states}\n{killed.log()}"
        assert killed.audit() == [], point
        # The record knows of the end a moment before the journal goes.
        killed.wait_until(lambda: not list(killed.sandboxes.iterdir()), 10, f"end of journals, {point}")
