"""`sandbatch hosts`, `drain`, `resume`: the fleet, and how a host is taken out of it and back."""

import time
from typing import Annotated

import typer

from cli import output, render
from cli.client import FOLLOW_S, Client
from cli.output import errors_for_humans, print_json, say
from tasks.host_record import LIVE, LOST, Facts
from tasks.lost import forget_host
from tasks.room import moment
from worker.errors import BadInput
from worker.settings import load_settings

app = typer.Typer()

Name = Annotated[str, typer.Argument(metavar="HOST", help="Its name, as sandbatch hosts shows it.")]


@app.command(epilog="Example: sandbatch hosts --json")
def hosts(
    forget: Annotated[
        str | None, typer.Option(metavar="NAME", help="Forget a host that is lost or stopped for good.")
    ] = None,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="With --forget: count its sandboxes as failed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """List the hosts: state, heartbeat, room, load, versions, labels."""
    with errors_for_humans():
        client = Client(load_settings())
        if force and forget is None:
            raise BadInput("--force", "is for --forget", "name the host with --forget")
        if forget is not None:
            _forget(client, forget, force=force)
            return
        rows = list(client.record.all_hosts().values())
        if as_json:
            print_json(rows)
        else:
            output.out.print(render.hosts(rows))


def _forget(client: Client, name: str, *, force: bool) -> None:
    facts = _known(client, name)
    if facts["state"] == LIVE:
        raise BadInput(f"--forget {name}", "the host is up", "stop its worker first")
    left = [row for row in client.record.get_all(client.record.ids_on(name)) if not row["replaced_by"]]
    if left and not force:
        why = f"{len(left)} sandboxes are there, as far as is known"
        todo = f"see sandbatch ls --host {name}; with --force they count as failed"
        raise BadInput(f"--forget {name}", why, todo)
    for row in left:
        say(f"{row['id']} counts as failed; perhaps it still runs on {name}")
    if not forget_host(client.record, name):
        raise BadInput(f"--forget {name}", "the host has just come back", "see sandbatch hosts")
    output.out.print(name)


@app.command(epilog="Example: sandbatch drain build-7 --why 'new disk' --wait --timeout 3600")
def drain(
    host: Name,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Shown by hosts and ls.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until no sandbox is left there.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Longest wait in seconds.")
    ] = None,
) -> None:
    """Let a host take no more work. Its sandboxes are not moved: they go on there to their end."""
    with errors_for_humans():
        if timeout is not None and not wait:
            raise BadInput("--timeout", "is for --wait", "add --wait")
        client = Client(load_settings())
        facts = _known(client, host)
        client.record.drain(host, True, why or (facts.get("drained") or {}).get("why", ""))
        output.out.print(host)
        if facts["state"] != LIVE:
            say(f"host {host} is {since(facts)}: it stays drained when it returns")
        elif not facts.get("pulls"):
            release = facts.get("version")
            say(f"host {host} is of release {release}: what clients of that release send it still takes")
        left = len(client.record.ids_on(host))
        if left:
            say(
                f"{_count(left)} on {host}, which {'is' if left == 1 else 'are'} not moved: "
                f"sandbatch rm --host {host} ends {'it' if left == 1 else 'them'}"
            )
        if wait and not _until_empty(client, host, timeout):
            left = len(client.record.ids_on(host))
            say(f"sandbatch: drain: {_count(left)} still on {host}; see sandbatch ls --host {host}")
            raise typer.Exit(1)


@app.command(epilog="Example: sandbatch resume build-7")
def resume(host: Name) -> None:
    """Let a host take work again."""
    with errors_for_humans():
        client = Client(load_settings())
        facts = _known(client, host)
        client.record.drain(host, False)
        output.out.print(host)
        if facts["state"] != LIVE:
            say(f"host {host} is {since(facts)}: it takes work when it returns")


def _until_empty(client: Client, host: str, timeout_s: float | None) -> bool:
    """Wait by events until no sandbox is left on a host; False if the time is up."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    mark, told = client.record.last_event(), ""  # the mark is older than the look
    while client.record.ids_on(host):
        left_s = FOLLOW_S if deadline is None else min(FOLLOW_S, deadline - time.monotonic())
        if left_s <= 0:
            return False
        events = list(client.record.follow(mark, left_s))
        mark = events[-1][0] if events else mark
        facts = {} if events else client.record.all_hosts().get(host, {})  # silence has no event
        if facts.get("state") == LOST and told != facts["heartbeat_at"]:
            told = facts["heartbeat_at"]
            say(f"host {host} is {since(facts)}: what becomes of its sandboxes is known when it returns")
    return True


def _known(client: Client, name: str) -> Facts:
    """What is known of a host.

    Raises:
        BadInput: Nothing.
    """
    hosts = client.record.all_hosts()
    if name not in hosts:
        raise BadInput(f"host {name}", "no such host", f"known: {', '.join(hosts) or 'none'}")
    return hosts[name]


def since(facts: Facts) -> str:
    """`lost since 12:00:03Z`."""
    return f"{facts['state']} since {moment(facts['heartbeat_at'])}"


def _count(number: int) -> str:
    return f"{number} sandbox{'' if number == 1 else 'es'}"
