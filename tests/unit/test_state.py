"""The states, their moves, and what the README says of them."""

import re
from pathlib import Path

import pytest

from tasks.state import MOVES, TERMINAL, State
from worker import launch
from worker.stages import STAGES

README = (Path(__file__).parents[2] / "README.md").read_text()
LIFE = README.split("## The life of a sandbox")[1].split("\n## ")[0]


def reachable(start: State) -> set[State]:
    seen, due = set(), [start]
    while due:
        for state in MOVES[due.pop()] - seen:
            seen.add(state)
            due.append(state)
    return seen


def test_every_state_has_its_moves():
    """The script in Redis looks a record's state up in this table, and fails where it is not."""
    assert set(MOVES) == set(State)
    assert all(moves <= set(State) for moves in MOVES.values())


def test_only_terminal_states_have_no_move():
    assert {state for state, moves in MOVES.items() if not moves} == TERMINAL
    assert {str(state) for state in TERMINAL} == set(launch.TERMINAL)


@pytest.mark.parametrize("state", sorted(set(State) - TERMINAL))
def test_every_state_can_end_and_every_end_can_be_reached(state):
    assert reachable(state) >= TERMINAL
    assert reachable(State.QUEUED) >= set(State) - {State.QUEUED}


@pytest.mark.parametrize("state", [State.STOPPING, State.UNDOING, State.STUCK])
def test_nothing_that_is_being_undone_runs_again(state):
    assert not reachable(state) & {State.QUEUED, State.PLACED, State.LAUNCHING, State.RUNNING}


def test_the_readmes_table_has_the_stages_of_the_code():
    """The issue asks for one table: who adds a stage changes both."""
    rows = re.findall(r"^\| (\w+) \| .+ \| .+ \|$", LIFE, re.MULTILINE)
    assert rows == ["stage", *(stage.name for stage in STAGES)]


def test_the_readmes_drawing_has_the_stages_in_their_order_and_every_end():
    drawing = LIFE.split("```")[1]
    first_line = drawing.strip().splitlines()[0]
    words = re.findall(r"[a-z]+", first_line)
    names = [stage.name for stage in STAGES]
    assert [word for word in words if word in names] == names
    shown = TERMINAL | {State.QUEUED, State.RUNNING, State.STOPPING, State.STUCK}
    assert set(re.findall(r"[a-z]+", drawing)) >= shown


def test_the_docstring_of_the_stages_has_their_order():
    from worker import stages

    drawing = next(line for line in (stages.__doc__ or "").splitlines() if "──▶" in line)
    assert drawing.strip().split(" ──▶ ") == [*(stage.name for stage in STAGES), "running"]
