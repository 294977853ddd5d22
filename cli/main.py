"""The command line: each command parses, calls one function and prints."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import output, render
from cli.client import Client, shown
from cli.elsewhere import Commands
from cli.output import errors_for_humans, one_line, print_json, say
from cli.parse import pair
from cli.waiting import tell_failures, until_gone, wait_for
from tasks.state import TERMINAL, State
from tasks.whys import explain
from worker.errors import BadInput
from worker.settings import load_settings

app = typer.Typer(
    name="sandbatch",
    cls=Commands,
    help="Launch gVisor sandboxes in batches, each in its own network namespace on a CNI network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]…", help="Full ids or unique prefixes.")]
Batch = Annotated[str | None, typer.Option(help="All sandboxes of one batch.")]
OnHost = Annotated[str | None, typer.Option(help="All of one host that are not removed yet.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]
Host = Annotated[str | None, typer.Option(help="Name of this host; its queue is host.NAME.")]
HostLabels = Annotated[
    list[str] | None,
    typer.Option("-l", "--label", metavar="K=V", help="Of this host, for run --on; may be repeated."),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="line|json", help="Of what it logs on stderr, an event a line.")
]
LogLevel = Annotated[str | None, typer.Option(metavar="debug|info|warning|error", help="Least that it logs.")]


@app.callback()
def options(
    config: Annotated[Path | None, typer.Option(help="Settings file.", metavar="FILE")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")] = False,
) -> None:
    """Options before the command."""
    output.debug = debug
    if config is not None:
        with errors_for_humans():
            if not config.is_file():
                raise BadInput(f"--config {config}", "no such file", "name a TOML file")
            os.environ["SANDBATCH_CONFIG"] = str(config.absolute())  # the worker's children read it, too


# -- commands of a host --------------------------------------------------------------------------


@app.command(epilog="Example: sandbatch setup --dry-run")
def setup(
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Install what this host lacks, and write our own network."""
    from worker.setup import setup as run_setup

    with errors_for_humans():
        if not run_setup(load_settings(), say, dry_run=dry_run):
            say("nothing to install")


@app.command(epilog="Example: sandbatch doctor --json")
def doctor(as_json: Json = False) -> None:
    """Show what a host needs: found, version, ok or the mend. Exit 0 only if all is ok."""
    from tasks.key_rows import key_rows
    from worker.doctor import doctor as look

    with errors_for_humans():
        settings = load_settings()
        rows = [*look(settings), *key_rows(settings)]
        if as_json:
            print_json([row.__dict__ for row in rows])
        else:
            table = render.table("NEEDED", "OK", "VERSION", "FOUND", "MEND")
            for row in rows:
                table.add_row(row.name, "ok" if row.ok else "NO", row.version, row.found, row.mend)
            output.out.print(table)
        if not all(row.ok for row in rows):
            raise typer.Exit(1)


@app.command(epilog="Example: sandbatch up --host build-7")
def up(
    host: Host = None,
    flower: Annotated[
        bool, typer.Option("--flower", help="Flower, too: a page of all tasks, on the loopback.")
    ] = False,
    flower_port: Annotated[int, typer.Option(min=1, max=65535, envvar="FLOWER_PORT")] = 5555,
    label: HostLabels = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Be everything on this machine: embedded broker and worker, until Ctrl-C. Sandboxes go on."""
    from cli.up import errors_in_the_log, run_up

    with errors_for_humans():
        flags = {"host": host, "labels": _labels(label), "log_format": log_format, "log_level": log_level}
        settings = load_settings(**flags)
        with errors_in_the_log(settings):
            raise typer.Exit(run_up(settings, flower_port=flower_port if flower else None))


@app.command(epilog="Example: sandbatch worker --host build-7 --capacity 200")
def worker(
    host: Host = None,
    capacity: Annotated[int | None, typer.Option(help="Sandboxes at a time.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Launches at a time.")] = None,
    label: HostLabels = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run this host's worker until it is told to stop. Sandboxes go on."""
    from cli.up import errors_in_the_log, run_host_worker

    with errors_for_humans():
        flags = {"host": host, "capacity": capacity, "slots": concurrency, "labels": _labels(label)}
        flags |= {"log_format": log_format, "log_level": log_level}
        settings = load_settings(**flags)
        with errors_in_the_log(settings):
            run_host_worker(settings)


def _labels(given: list[str] | None) -> str | None:
    """Of the command line, in place of the setting; as JSON: pydantic adds one dict to another."""
    return json.dumps(dict(pair(one, "--label") for one in given)) if given else None


@app.command(epilog="Example: sandbatch flower --port 5555")
def flower(
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="FLOWER_PORT")] = 5555,
    address: Annotated[
        str,
        typer.Option(envvar="FLOWER_ADDRESS", help="Beyond the loopback FLOWER_BASIC_AUTH is needed."),
    ] = "127.0.0.1",
) -> None:
    """Run Flower on the same broker: a page of all tasks, to read."""
    from cli.flower import flower_argv

    with errors_for_humans():
        settings = load_settings()
        argv = flower_argv(port, address)
        Client(settings)
        say(f"Flower: port {port} of {address or 'any address'}; Ctrl-C stops it")
        os.execv(argv[0], argv)  # noqa: S606 - argv list, no shell


@app.command(epilog="Example: sandbatch audit --json")
def audit(
    as_json: Json = False,
    mend: Annotated[
        bool, typer.Option("--mend", help="Remove what is ours and provably dead, then look again.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Ask the CNI plugins, too, whether attachments are as made.")
    ] = False,
) -> None:
    """Compare this host with its journals: prints what should not be there or is missing; 0 if clean."""
    from worker.audit import audit as look
    from worker.last_audit import note

    with errors_for_humans():
        _need_root("audit")
        if mend and deep:
            raise BadInput("--mend --deep", "one at a time", "mend first")
        if mend:
            raise _mend(as_json)
        settings = load_settings()
        findings = look(settings)
        if deep:
            from worker.deep import check_all

            findings += check_all(settings)
        if as_json:
            print_json([finding.__dict__ for finding in findings])
        elif findings:
            table = render.table("KIND", "OBJECT", "PROBLEM", "SANDBOX", "DETAIL")
            for one in findings:
                table.add_row(one.kind, one.name, one.problem, one.container_id or "-", one.detail)
            output.out.print(table)
        bad = [one for one in findings if one.is_bad]
        note(settings, (one.kind for one in bad))
        say("audit: clean" if not bad else f"audit: {len(bad)} found")
        if bad:
            raise typer.Exit(1)


@app.command(epilog="Example: sandbatch demo")
def demo() -> None:
    """Run gVisor's CNI tutorial three times, start to end, and prove that nothing is left."""
    from cli.demo import run_demo

    with errors_for_humans():
        _need_root("demo")
        raise typer.Exit(run_demo(load_settings()))


# -- commands of a user --------------------------------------------------------------------------


@app.command(epilog="Example: sandbatch show sb-0123")
def show(container_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """Show one sandbox: spec, host, IP, and the timeline of its stages and undos."""
    with errors_for_humans():
        client = Client(load_settings())
        row = client.resolve([container_id])[0]
        explain(client.record, [row])
        if as_json:
            print_json({**shown(row), "pull": client.record.pull_for(row)})
        else:
            output.out.print(render.details(row))
            if row["stages"]:
                output.out.print()
                output.out.print(render.timeline(row["stages"]))


@app.command(epilog="Example: sandbatch wait --batch b-0123456789ab --for running --timeout 60")
def wait(
    ids: Ids = None,
    batch: Batch = None,
    goal: Annotated[str, typer.Option("--for", metavar="running|terminal")] = "terminal",
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Longest wait in seconds.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json|.xml", help="Of a batch: write what became of it (JUnit)."),
    ] = None,
) -> None:
    """Wait until sandboxes run or have ended; exit 1 if one failed or the time is up.

    Ends are printed as `ID CODE`, a line each; of a single ID its exit code is this command's as well.
    A batch with a rule (--success) ends with 0 if it is kept, else with 1.
    """
    with errors_for_humans():
        if goal not in ("running", "terminal"):
            raise BadInput(f"--for {goal}", "not known", "running or terminal")
        if batch is not None and not ids:
            from cli.batch_wait import wait_for_batch

            raise typer.Exit(
                wait_for_batch(load_settings(), batch, goal, timeout, report_to=report, with_codes=True)
            )
        if report is not None:
            raise BadInput("--report", "is for a batch", "name one with --batch, and no ids")
        client = Client(load_settings())
        wanted = _named(client, ids, batch)
        states = wait_for(client, [row["id"] for row in wanted], goal, timeout)
        # Who has ended by itself did run.
        good = {State.EXITED, State.RUNNING if goal == "running" else State.CANCELLED}
        late = [one for one, state in states.items() if state not in good and state not in TERMINAL]
        if late:
            say(f"sandbatch: wait: {len(late)} of {len(states)} not there yet; see sandbatch ls")
        code = _print_codes(client, list(states)) if goal == "terminal" else 0
        if any(state not in good for state in states.values()):
            raise tell_failures(client, list(states), code)
        if code and len(ids or ()) == 1:
            raise typer.Exit(code)


def _print_codes(client: Client, ids: list[str]) -> int:
    """Print how each program ended; returns the last code."""
    code = 0
    for row in client.record.get_all(ids):
        if row["exit_code"] is not None and row["state"] in TERMINAL:
            output.out.print(f"{row['id']} {row['exit_code']}")
            code = int(row["exit_code"])
    return code


@app.command(epilog="Example: sandbatch rm --all")
def rm(
    ids: Ids = None,
    batch: Batch = None,
    host: OnHost = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are not removed yet.")] = False,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="No error for ids that are not known.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask for it, and return.")] = False,
) -> None:
    """Stop and remove sandboxes; waits until nothing of them is left. Prints their ids."""
    from tasks.submit import remove

    with errors_for_humans():
        client = Client(load_settings())
        rows = _all_or_named(client, ids, batch, everything, host=host, unknown_ok=force)
        remove(client.app(), client.record, rows)
        raise typer.Exit(until_gone(client, "rm", rows, no_wait=no_wait))


@app.command(epilog="Example: sandbatch stop --time 30 sb-0123")
def stop(
    ids: Ids = None,
    batch: Batch = None,
    host: OnHost = None,
    everything: Annotated[bool, typer.Option("--all", help="All that have not ended.")] = False,
    grace: Annotated[
        float | None,
        typer.Option("-t", "--time", min=0, max=3600, metavar="S", help="Grace; by default that of the run."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask for it, and return.")] = False,
) -> None:
    """Ask sandboxes to end (TERM), and end them after a grace (KILL); waits for that. Prints their ids.

    They keep their record, their exit code and, for a while, their log.
    """
    from tasks.submit import stop as ask_to_stop

    with errors_for_humans():
        client = Client(load_settings())
        rows = _all_or_named(client, ids, batch, everything, host=host)
        ask_to_stop(client.app(), client.record, rows, grace)
        raise typer.Exit(until_gone(client, "stop", rows, no_wait=no_wait))


def _all_or_named(
    client: Client,
    ids: list[str] | None,
    batch: str | None,
    everything: bool,
    *,
    host: str | None,
    unknown_ok: bool = False,
) -> list[dict[str, Any]]:
    if not everything and host is None:
        return _named(client, ids, batch, unknown_ok=unknown_ok)
    if ids or batch is not None or (everything and host is not None):
        option = "--all" if everything else f"--host {host}"
        raise BadInput(option, "ids, --batch or another are given as well", "give one of them")
    return [row for row in client.select(host=host) if not row["removed"]]


def main() -> None:
    """The `sandbatch` program."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:  # typer's own words about the arguments, in our one line
        words = getattr(error, "format_message", error.__str__)().rstrip(".")
        command = "" if sys.argv[1].startswith("-") else sys.argv[1]
        text = f"sandbatch: {command or 'arguments'}: {words}; see sandbatch {command} --help"
        say(one_line(text.replace("  ", " ")))
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def _mend(as_json: bool) -> typer.Exit:
    """Mend, and print what is removed and what is left; the exit."""
    from worker.last_audit import note
    from worker.mend import mend

    settings = load_settings()
    outcomes = mend(settings)
    note(settings, (one.finding.kind for one in outcomes if not one.mended))
    if as_json:
        rows = [{**one.finding.__dict__, "mended": one.mended, "why": one.why} for one in outcomes]
        print_json(rows)
    elif outcomes:
        table = render.table("KIND", "OBJECT", "PROBLEM", "SANDBOX", "MENDED", "WHY")
        for one in outcomes:
            found, answer = one.finding, "removed" if one.mended else "NO"
            table.add_row(found.kind, found.name, found.problem, found.container_id or "-", answer, one.why)
        output.out.print(table)
    left = sum(not one.mended for one in outcomes)
    say(f"audit: {len(outcomes) - left} mended, {left} left" if outcomes else "audit: clean")
    return typer.Exit(1 if left else 0)


def _named(
    client: Client, ids: list[str] | None, batch: str | None, *, unknown_ok: bool = False
) -> list[dict[str, Any]]:
    if not ids and batch is None:
        raise BadInput("ID", "none given", "name ids, or --batch")
    return client.select(ids or (), batch=batch, unknown_ok=unknown_ok)


def _need_root(command: str) -> None:
    if os.geteuid() != 0:
        raise BadInput(command, "root is needed", "run it as root on the host")
