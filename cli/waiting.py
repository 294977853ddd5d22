"""Wait for sandboxes as a command does: a progress bar on a terminal, silence elsewhere."""

import sys

import typer

from cli.client import Client, has_reached
from cli.output import say


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
