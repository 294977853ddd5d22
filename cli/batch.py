"""`sandbatch batch`, `batches`, `cancel`: many sandboxes as one object."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import batch_specs, render, report
from cli.batch_wait import wait_for_batch
from cli.client import Client
from cli.output import errors_for_humans, one_line, out, print_json, print_json_rows, say
from cli.waiting import until_gone
from tasks.state import TERMINAL
from worker.errors import BadInput
from worker.settings import load_settings

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command(epilog="Example: sandbatch batch jobs.yaml --success 90% --wait --report jobs.xml")
def batch(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="YAML, JSON, or JSON Lines.")],
    name: Annotated[str | None, typer.Option(help="Of the batch; a new one.")] = None,
    success: Annotated[
        str | None, typer.Option(metavar="all|N|N%", help="As many are to succeed; by default all.")
    ] = None,
    max_in_flight: Annotated[
        str | None, typer.Option("--max-in-flight", metavar="N", help="Most at a time.")
    ] = None,
    waves: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Sizes; a wave goes once all before it are up. The last repeats."),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="S|TIME", help="Those that have not ended by then fail.")
    ] = None,
    fail_fast: Annotated[
        bool | None,
        typer.Option("--fail-fast/--no-fail-fast", help="Cancel the rest once --success is out of reach."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until all have ended; exit 0 if the rule is kept.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Longest wait in seconds.")] = None,
    report_to: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.json|.xml", help="With --wait: what became of each (JUnit)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Enqueue the sandboxes of a file, all or none, and print the batch's id.

    FILE is a list of specs, or has `defaults`, `specs` (each may have a `count`) and these options by name.
    """
    from tasks.submit import submit

    given = {"name": name, "success": success, "max_in_flight": max_in_flight, "waves": waves}
    given |= {"deadline": deadline, "fail_fast": None if fail_fast is None else str(fail_fast)}
    with errors_for_humans():
        for option, value in {"--report": report_to, "--timeout": timeout}.items():
            if value is not None and not wait:
                raise BadInput(option, "goes with --wait", "add it, or see sandbatch wait --batch")
        if report_to is not None:
            report.check(report_to)
        settings = load_settings()
        options = {word: value for word, value in given.items() if value is not None}
        try:
            asked = batch_specs.read(_bytes(file), _shown(file), settings.network, options)
            client = Client(settings)
            batch_specs.check_needs(asked, client.validate)
        except batch_specs.BadFile as error:
            for line in error.lines:
                say(one_line(f"sandbatch: {line}"))
            raise error.summary from None
        made, ids = submit(client.app(), client.record, settings, asked.specs, asked.name, asked.plan)
        if not as_json:
            out.print(made)
        say(f"{len(ids)} sandboxes")
        if not client.record.live_hosts():
            say("no host is up: they wait as queued; start sandbatch up, or sandbatch worker")
        code = wait_for_batch(settings, made, timeout_s=timeout, report_to=report_to) if wait else 0
        if as_json:
            print_json({"batch": made, **_counted(client.record.batch(made) or {"name": made}), "ids": ids})
        raise typer.Exit(code)


@app.command(epilog="Example: sandbatch batches --json")
def batches(as_json: Json = False) -> None:
    """List batches, oldest first: how far they are, and how they ended."""
    with errors_for_humans():
        rows = [_counted(one) for one in Client(load_settings()).record.batches()]
        if as_json:
            print_json_rows(rows)
        else:
            out.print(render.batches(rows))


@app.command(epilog="Example: sandbatch cancel nightly")
def cancel(
    name: Annotated[str, typer.Argument(metavar="BATCH")],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask for it, and return.")] = False,
    as_json: Json = False,
) -> None:
    """Drop what waits of a batch and undo what runs; waits until nothing of it is left. Prints the ids.

    Their records, and for a while their logs, stay.
    """
    from tasks.submit import cancel as ask_to_cancel

    with errors_for_humans():
        client = Client(load_settings())
        if client.record.batch(name) is None:
            raise BadInput(f"batch {name}", "no such batch", "see sandbatch batches")
        ids = client.record.batch_ids(name)
        rows = [row for row in client.record.get_all(ids) if row["state"] not in TERMINAL]
        if rows:
            ask_to_cancel(client.app(), client.record, name)
        else:
            say(f"batch {name}: all of it has ended already")
        code = until_gone(client, "cancel", rows, no_wait=no_wait, shows_ids=not as_json)
        if as_json:
            found = _counted(client.record.batch(name) or {"name": name})
            print_json({"batch": name, **found, "ids": [row["id"] for row in rows]})
        raise typer.Exit(code)


def _counted(row: dict[str, Any]) -> dict[str, Any]:
    """A batch with how many wait, start and run; what has ended was up as well."""
    if "total" not in row:
        return row
    held = 0 if row["outcome"] else min(row["held"], row["total"] - row["ended"])
    running = row["up"] - row["ended"]
    starting = max(0, row["total"] - row["ended"] - held - running)
    return {**row, "held": held, "starting": starting, "running": running}


def _shown(file: str) -> str:
    return "stdin" if file == "-" else file


def _bytes(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        why = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"batch {_shown(file)}", why, "name a file, or - for stdin") from None
