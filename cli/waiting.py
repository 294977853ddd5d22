"""Wait for sandboxes as a command does: a progress bar on a terminal, silence elsewhere."""

import sys
from typing import Any

import typer

from cli import output
from cli.client import Client, has_reached
from cli.output import say
from tasks.state import TERMINAL, State

Rows = list[dict[str, Any]]


def wait_for(client: Client, ids: list[str], goal: str, timeout_s: float | None) -> dict[str, str]:
    """Wait with a progress bar on a terminal, in silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cli.output import err  # with rich

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(goal, total=len(ids))

        def draw(states: dict[str, str]) -> None:
            counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
            words = ", ".join(f"{number} {state}" for state, number in counts.items())
            done = sum(has_reached(state, goal) for state in states.values())
            progress.update(bar, completed=done, description=words)

        return client.wait(ids, goal, timeout_s, draw)


def tell_failures(client: Client, ids: list[str], code: int = 0) -> typer.Exit:
    """Say why sandboxes failed; the exit to raise, with the exit code of the one that there is."""
    for row in client.record.get_all(ids):
        if row["error"]:
            error = row["error"]
            say(f"sandbatch: {row['id']}: {row['state']} at {error['stage']}: {error['message']}")
    return typer.Exit(code if code and len(ids) == 1 else 1)


def until_gone(client: Client, command: str, rows: Rows, *, no_wait: bool, shows_ids: bool = True) -> int:
    """Print the ids; wait until nothing of them is left, but not for a host that is not up.

    Returns the exit code: 1 where something stays, which is said.
    """
    names = [row["id"] for row in rows]
    away = _on_hosts_away(client, rows)
    states = {} if no_wait else wait_for(client, [one for one in names if one not in away], "gone", None)
    if names and shows_ids:
        output.out.print("\n".join(names))
    if away and not no_wait:
        hosts = ", ".join(sorted(set(away.values())))
        todo = "it undoes them once it is back"
        say(f"sandbatch: {command}: {', '.join(away)}: host {hosts} is not up; {todo}")
        return 1
    stuck = [one for one, state in states.items() if state == State.STUCK]
    if stuck:
        say(f"sandbatch: {command}: {', '.join(stuck)} stuck, its host goes on trying; see sandbatch show")
        return 1
    return 0


def _on_hosts_away(client: Client, rows: Rows) -> dict[str, str]:
    """Sandboxes that a host without a heartbeat has, with the host: nobody knows how long a wait would be."""
    live = client.record.live_hosts()
    now = client.record.get_all([row["id"] for row in rows])
    return {row["id"]: row["host"] for row in now if row["state"] not in TERMINAL and row["host"] not in live}
