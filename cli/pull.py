"""`sandbatch pull`: hosts have an image before a batch asks for it, and how they come by it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cli import output
from cli.client import FOLLOW_S, Client
from cli.hosts import since
from cli.image_hosts import Errors, choose, tell
from cli.images import read_reference, short
from cli.output import errors_for_humans, one_line, print_json, say
from tasks.host_record import LIVE
from tasks.pulls import ENDED
from tasks.signing import signer
from tasks.submit import order_pull
from tasks.whys import so_far
from worker.errors import BadInput, SandbatchError
from worker.limits import rough
from worker.settings import load_settings

app = typer.Typer()

INTERRUPTED = 130
Row = dict[str, Any]
Show = Callable[[list[Row]], None]


@app.command(epilog="Examples: sandbatch pull python:3.13-slim --all-hosts, sandbatch pull oci:./image:v1")
def pull(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="NAME[:TAG|@DIGEST] of a registry, oci:DIR[:TAG], docker-archive:FILE or oci-archive:FILE.",
        ),
    ],
    host: Annotated[str | None, typer.Option(metavar="HOST", help="If more than one host is up.")] = None,
    all_hosts: Annotated[bool, typer.Option("--all-hosts", help="All that are up and take work.")] = False,
    policy: Annotated[
        str,
        typer.Option(
            "--pull", metavar="always|missing", help="missing: what a host has by that name will do."
        ),
    ] = "always",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Have hosts pull an image, so that no sandbox waits for it. Prints `HOST DIGEST` lines.

    A folder or an archive is one of the host's own. Ctrl-C leaves the pull going.
    """
    with errors_for_humans():
        if policy not in ("always", "missing"):
            raise BadInput(f"--pull {policy}", "not known", "always or missing")
        if host is not None and all_hosts:
            raise BadInput("--all-hosts", f"--host {host} is given as well", "give one of them")
        ref = read_reference(reference)
        client = Client(load_settings())
        names, errors = _hosts(client, host, all_hosts=all_hosts)
        orders = order_pull(client.app(), client.record, names, str(ref), policy, signer(client.settings))
        try:
            rows = _follow(client, orders)
        except KeyboardInterrupt:
            say("the pull goes on; sandbatch images shows when the image is there")
            raise typer.Exit(INTERRUPTED) from None
        for name in set(names) - {row["host"] for row in rows}:
            todo = "see sandbatch images"
            errors[name] = SandbatchError("pull", "the broker has forgotten what became of it", todo)
        errors |= {row["host"]: _failure(row) for row in rows if row["state"] == "failed"}
        if as_json:
            print_json(rows)
        else:
            for row in rows:
                if row["state"] == "done":
                    print(f"{row['host']} {row['digest']}")
        tell(errors)
        if errors:
            raise typer.Exit(1)


def _hosts(client: Client, host: str | None, *, all_hosts: bool) -> tuple[list[str], Errors]:
    names, errors = choose(client, host, "pull")
    if host is not None:
        return names, errors
    if not all_hosts and len(names) + len(errors) > 1:
        live = ", ".join(sorted([*names, *errors]))
        raise BadInput("pull", f"several hosts are up: {live}", "name one with --host, or give --all-hosts")
    if not all_hosts and errors:
        (error,) = errors.values()
        raise BadInput(error.what, error.why, error.todo)
    drained = {name for name, one in client.record.all_hosts().items() if one.get("drained")} & set(names)
    if all_hosts and drained:
        say(f"drained, so left out: {', '.join(sorted(drained))}")
        names = [name for name in names if name not in drained]
    if not names and not errors:
        raise SandbatchError("pull", "all hosts that are up are drained", "see sandbatch resume, or --host")
    return names, errors


def _failure(row: Row) -> SandbatchError:
    return SandbatchError(f"host {row['host']}", row["error"] or "it says no reason")


def _follow(client: Client, orders: dict[str, str]) -> list[Row]:
    """Show how orders go on until all have ended; the last that is known of each, in their order."""
    known: dict[str, Row] = {}
    silent: set[str] = set()
    with _live() if sys.stderr.isatty() else _as_lines() as show:
        for changed in client.record.follow_orders(list(orders.values()), FOLLOW_S):
            known |= {row["id"]: row for row in changed}
            waiting = {row["host"] for row in known.values() if row["state"] not in ENDED}
            if not changed:  # silence has no event
                silent = _tell_silent(client, waiting, silent)
            show([known[one] for one in orders.values() if one in known])
    return [known[one] for one in orders.values() if one in known and known[one]["state"] in ENDED]


def _tell_silent(client: Client, waiting: set[str], told: set[str]) -> set[str]:
    """Say of hosts that are not up that their pull waits; returns those that are not."""
    hosts = client.record.all_hosts()
    away = {name for name in waiting if name in hosts and hosts[name]["state"] != LIVE}
    for name in sorted(away - told):
        say(f"host {name} is {since(hosts[name])}: it pulls when it is back")
    return away


@contextmanager
def _live() -> Iterator[Show]:
    """A line for each host, redrawn."""
    from rich.live import Live
    from rich.text import Text

    begun: dict[str, tuple[float, int]] = {}
    with Live(console=output.err, auto_refresh=False) as live:

        def show(rows: list[Row]) -> None:
            lines = [f"{row['host']}: {_words(row)}{_rate(row, begun)}" for row in rows]
            live.update(
                Text("\n".join(map(one_line, lines)), no_wrap=True, overflow="ellipsis"), refresh=True
            )

        yield show


@contextmanager
def _as_lines() -> Iterator[Show]:
    """A line for each phase of each host."""
    told: dict[str, tuple[Any, ...]] = {}

    def show(rows: list[Row]) -> None:
        for row in rows:
            phase = (row["state"], row["phase"], row["tries"], row["words"])
            if told.get(row["id"]) != phase and row["state"] != "failed":  # that is said as the error
                told[row["id"]] = phase
                say(one_line(f"{row['host']}: {_words(row)}"))

    yield show


def _words(row: Row) -> str:
    if row["state"] == "done":
        return f"done, {short(row['digest'] or '')}"
    if row["state"] == "failed":
        return "failed"
    return so_far(row) if row["phase"] else "asked"


def _rate(row: Row, begun: dict[str, tuple[float, int]]) -> str:
    """Of the bytes since this command has seen the first of them."""
    if row["phase"] != "pulling" or row["state"] in ENDED or row["done_bytes"] is None:
        begun.pop(row["id"], None)
        return ""
    moment, done = time.monotonic(), row["done_bytes"]
    since_s, first = begun.setdefault(row["id"], (moment, done))
    if moment - since_s < 0.5 or done < first:
        return ""
    return f", {rough(int((done - first) / (moment - since_s)))}/s"
