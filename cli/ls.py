"""`sandbatch ls`: thousands of sandboxes as a table, as JSON, and as they change."""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from cli import output, render
from cli.client import Client, shown
from cli.output import errors_for_humans, print_json_rows
from tasks.whys import explain
from worker.settings import load_settings

app = typer.Typer()

Rows = list[dict[str, Any]]


@app.command(epilog="Example: sandbatch ls --state running --label team=red")
def ls(
    batch: Annotated[str | None, typer.Option(help="All sandboxes of one batch.")] = None,
    host: Annotated[str | None, typer.Option(help="Only of this host.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option("-l", "--label", metavar="K=V")] = None,
    everything: Annotated[bool, typer.Option("-a", "--all", help="Removed ones, too.")] = False,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on as they change, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """List sandboxes, oldest first; those removed are left out unless asked for."""
    with errors_for_humans(), nullcontext() if watch else _without_gc():
        client = Client(load_settings())

        def select() -> Rows:
            read = client.select if as_json else client.rows
            rows = read(batch=batch, host=host, states=state or [], labels=label or [])
            rows = [row for row in rows if everything or state or batch or not row["removed"]]
            explain(client.record, rows)
            return rows

        if watch:
            _watch(client, select, as_json)
        elif as_json:
            print_json_rows(shown(row) for row in select())
        else:
            print(render.sandboxes(select()))


@contextmanager
def _without_gc() -> Iterator[None]:
    """One answer, then the end: to look for cycles in it meanwhile is a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _watch(client: Client, select: Callable[[], Rows], as_json: bool) -> None:
    """The table redrawn on a terminal; elsewhere, and as JSON, a line for each sandbox that changed."""
    is_live = sys.stdout.isatty() and not as_json
    mark, known = client.record.last_event(), dict[str, str]()
    with _live() if is_live else _as_lines(as_json) as show:
        while True:
            rows = select()
            show(rows if is_live else [row for row in rows if known.get(row["id"]) != row["state"]])
            known = {row["id"]: row["state"] for row in rows}
            mark = client.next_change(mark)


@contextmanager
def _live() -> Iterator[Callable[[Rows], None]]:
    from rich.live import Live
    from rich.text import Text

    with Live(console=output.out, auto_refresh=False) as live:
        yield lambda rows: live.update(Text(render.sandboxes(rows), no_wrap=True), refresh=True)


@contextmanager
def _as_lines(as_json: bool) -> Iterator[Callable[[Rows], None]]:
    def show(rows: Rows) -> None:
        for row in rows:
            print(json.dumps(shown(row)) if as_json else render.line(row), flush=True)

    yield show
