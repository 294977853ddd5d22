"""kill -9 of the worker at each point of a life; a new worker: running or ended, nothing left."""

import time

import pytest

from tests.host.system import SERVER, System

TAKEN_UP_S = 15.0
STAGES = ("netns", "network", "bundle", "container")
LAUNCHING = [
    "message.place.publish.after",  # of the client, which has no faults: see the worker's own points
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
][1:]
REMOVING = [
    "message.unwind.run.before",
    "journal.facts.after",
    "message.undo.container.publish.before",
    *(f"journal.undo.{stage}.after" for stage in STAGES),
    *(f"stage.{stage}.undo.after" for stage in STAGES),
    *(f"journal.undone.{stage}.after" for stage in STAGES),
]


def restart(system: System) -> float:
    """A worker without faults; the moment of its start."""
    system.wait_for_end()
    system.env.clear()
    system.start()
    return time.monotonic()


@pytest.mark.parametrize("point", LAUNCHING)
def test_killed_while_launching(make_system, point: str):
    """Within 15 s of the new worker's start the sandbox is running or failed, and nothing else is there."""
    system = make_system(SANDBATCH_FAULTS=f"{point}:kill", SANDBATCH_ALLOW_FAULTS="1")
    system.start()
    (container_id,) = system.run(*SERVER)

    began = restart(system)

    state = system.wait([container_id], "running", TAKEN_UP_S)[container_id]
    assert state in ("running", "failed"), system.log()
    assert time.monotonic() - began < TAKEN_UP_S
    assert system.audit() == []
    system.cli("rm", container_id)
    assert system.audit() == []


@pytest.mark.parametrize("point", REMOVING)
def test_killed_while_removing(make_system, point: str):
    """The undo goes on where it stood."""
    faults = f"{point}:kill" if point != "journal.facts.after" else f"{point}:kill:2"  # 1: running_at
    system = make_system(SANDBATCH_FAULTS=faults, SANDBATCH_ALLOW_FAULTS="1")
    system.start()
    (container_id,) = system.run("--wait", *SERVER)
    system.cli("rm", "--no-wait", container_id)

    restart(system)

    assert system.wait([container_id], "terminal", TAKEN_UP_S) == {container_id: "exited"}
    assert system.audit() == []
    assert list(system.sandboxes.iterdir()) == []
