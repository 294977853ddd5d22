"""`sandbatch run`: its options as a spec, then the batch."""

from pathlib import Path
from typing import Annotated

import typer

from cli import parse
from cli.attach import attach as follow_to_its_end
from cli.client import Client, shown
from cli.output import errors_for_humans, out, print_json, say
from cli.plan import print_plan
from cli.refused import RefusingCommand
from cli.waiting import tell_failures, wait_for
from tasks.state import State
from worker.errors import BadInput
from worker.image_ref import absolute
from worker.settings import load_settings
from worker.spec import make_spec

app = typer.Typer()

HELP_LIMITS, HELP_END, HELP_NETWORK, HELP_FILES = "Limits", "Its end", "Network", "Files"
HELP_IMAGE = "Image"


@app.command(
    cls=RefusingCommand,
    epilog="Example: sandbatch run --ready http:8000/ --cwd /var/www/html -- python3 -m http.server 8000",
    context_settings={"allow_interspersed_args": False},
)
def run(
    args: Annotated[
        list[str] | None, typer.Argument(metavar="CMD [ARG]…", help="The command, after --.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Sandboxes to launch.")] = 1,
    host: Annotated[str | None, typer.Option(help="Only on this host.")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="K=V", help="Only on hosts with this label; may be repeated."),
    ] = None,
    reschedule: Annotated[
        bool, typer.Option("--reschedule", help="If its host is lost, launch it elsewhere under a new id.")
    ] = False,
    env: Annotated[list[str] | None, typer.Option("-e", "--env", metavar="K=V")] = None,
    cwd: Annotated[str | None, typer.Option(metavar="DIR", help="Working directory.")] = None,
    label: Annotated[list[str] | None, typer.Option("-l", "--label", metavar="K=V")] = None,
    ready: Annotated[
        str | None,
        typer.Option(metavar="tcp:PORT|http:PORT/PATH|none", help="Default: a port that the image exposes."),
    ] = None,
    ready_timeout: Annotated[float, typer.Option(metavar="S", help="Seconds until an answer.")] = 60.0,
    batch_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the batch; one that is there grows.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until they run; exit 1 if one fails.")] = False,
    attach: Annotated[
        bool, typer.Option("-a", "--attach", help="Print what it writes, and exit as it does.")
    ] = False,
    # -- limits
    memory: Annotated[
        str | None,
        typer.Option(
            "-m", "--memory", metavar="SIZE", help="Most memory, such as 512m.", rich_help_panel=HELP_LIMITS
        ),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(metavar="N", help="Most CPU, such as 0.5.", rich_help_panel=HELP_LIMITS)
    ] = None,
    pids: Annotated[
        int | None, typer.Option(metavar="N", help="Most processes and threads.", rich_help_panel=HELP_LIMITS)
    ] = None,
    # -- its end
    ttl: Annotated[
        float | None,
        typer.Option(metavar="S", help="Stop it so long after it began to run.", rich_help_panel=HELP_END),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="S|TIME", help="It fails if it has not ended by then.", rich_help_panel=HELP_END
        ),
    ] = None,
    stop_grace: Annotated[
        float, typer.Option(metavar="S", help="Between TERM and KILL.", rich_help_panel=HELP_END)
    ] = 10.0,
    stop_signal: Annotated[
        str | None,
        typer.Option(metavar="SIGNAL", help="In place of TERM.", rich_help_panel=HELP_END),
    ] = None,
    restart: Annotated[
        str, typer.Option(metavar="no|on-failure[:N]", help="What follows its end.", rich_help_panel=HELP_END)
    ] = "no",
    keep: Annotated[
        float | None,
        typer.Option(metavar="S", help="Keep its log so long after its end.", rich_help_panel=HELP_END),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--rm", help="Forget it once it has ended.", rich_help_panel=HELP_END)
    ] = False,
    # -- network
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:ip=A,mac=A,alias=N]",
            help="CNI network; may be repeated.",
            rich_help_panel=HELP_NETWORK,
        ),
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--publish",
            metavar="[IP:][HOSTPORT:]PORT[/udp]",
            help="A port on the host.",
            rich_help_panel=HELP_NETWORK,
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="in=RATE,out=RATE", help="In bits a second, such as 10m.", rich_help_panel=HELP_NETWORK
        ),
    ] = None,
    dns: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="Name server.", rich_help_panel=HELP_NETWORK)
    ] = None,
    dns_search: Annotated[
        list[str] | None, typer.Option(metavar="DOMAIN", rich_help_panel=HELP_NETWORK)
    ] = None,
    add_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:ADDRESS", help="A line of /etc/hosts.", rich_help_panel=HELP_NETWORK),
    ] = None,
    egress: Annotated[
        list[str] | None,
        typer.Option(
            metavar="deny|CIDR[:PORT][/udp]",
            help="All that it may send to, but replies; may be repeated.",
            rich_help_panel=HELP_NETWORK,
        ),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option(
            "--isolate",
            help="Apart from the other sandboxes of its networks; the host stays in reach.",
            rich_help_panel=HELP_NETWORK,
        ),
    ] = False,
    # -- files
    image: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="docker://NAME, NAME, oci:DIR[:TAG], docker-archive:FILE, oci-archive:FILE.",
            rich_help_panel=HELP_IMAGE,
        ),
    ] = None,
    pull: Annotated[
        str,
        typer.Option(
            metavar="missing|always|never", help="Whether to ask the registry.", rich_help_panel=HELP_IMAGE
        ),
    ] = "missing",
    entrypoint: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="In place of the image's and its Cmd.", rich_help_panel=HELP_IMAGE),
    ] = None,
    user: Annotated[
        str,
        typer.Option(
            "-u", "--user", metavar="USER[:GROUP]", help="Names are the image's.", rich_help_panel=HELP_IMAGE
        ),
    ] = "",
    group_add: Annotated[
        list[int] | None,
        typer.Option(metavar="GID", help="One more group.", rich_help_panel=HELP_IMAGE),
    ] = None,
    read_only: Annotated[
        bool,
        typer.Option("--read-only", help="As --writable no, with an image.", rich_help_panel=HELP_IMAGE),
    ] = False,
    rootfs: Annotated[
        str,
        typer.Option(
            metavar="host|DIR", help="Root file system, shared and read-only.", rich_help_panel=HELP_FILES
        ),
    ] = "host",
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "-v",
            "--volume",
            metavar="SOURCE:TARGET",
            help="Read-only bind of a host folder.",
            rich_help_panel=HELP_FILES,
        ),
    ] = None,
    tmpfs: Annotated[
        list[str] | None, typer.Option(metavar="TARGET[:size=SIZE]", rich_help_panel=HELP_FILES)
    ] = None,
    writable: Annotated[
        str | None,
        typer.Option(
            metavar="no|memory|disk[:SIZE]",
            help="Let it write to its root, for itself alone; by default no, with an image memory.",
            rich_help_panel=HELP_FILES,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="On the host: print what a launch would hand to runsc, CNI and nft, do nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Enqueue sandboxes and print their ids, one a line."""
    from tasks.submit import submit

    with errors_for_humans():
        if reschedule and host is not None:
            raise BadInput("--reschedule", f"--host {host} leaves it no other host", "leave one of them out")
        if reschedule and attach:
            raise BadInput("--reschedule", "--attach follows one sandbox only", "leave one of them out")
        if read_only and writable not in (None, "no"):
            raise BadInput("--read-only", f"--writable {writable} is the contrary", "leave one of them out")
        settings = load_settings()
        silent = {"cwd": cwd, "ready": ready}  # what an image may say
        spec = make_spec(
            args=args or [],
            image=None if image is None else absolute(image, Path.cwd()),
            pull=pull,
            entrypoint=None if entrypoint is None else [entrypoint] if entrypoint else [],
            user=user,
            groups=group_add or [],
            stop_signal=stop_signal,
            rootfs=rootfs,
            networks=[parse.network(one) for one in network or [settings.network]],
            host=host,
            on=dict(parse.pair(one, "--on") for one in on or []),
            reschedule=reschedule,
            env=dict(parse.pair(one, "--env") for one in env or []),
            labels=dict(parse.pair(one, "--label") for one in label or []),
            ready_timeout_s=ready_timeout,
            memory_bytes=None if memory is None else parse.size(memory, "--memory"),
            cpus=cpus,
            pids=pids,
            ttl_s=ttl,
            deadline_at=None if deadline is None else parse.moment(deadline),
            stop_grace_s=stop_grace,
            restart=restart,
            keep_s=keep,
            remove=remove,
            publish=[parse.publish(one) for one in publish or []],
            bandwidth=None if bandwidth is None else parse.bandwidth(bandwidth),
            dns=dns or [],
            dns_search=dns_search or [],
            hosts=dict(parse.name_and_address(one) for one in add_host or []),
            egress=parse.egress(egress or []),
            isolate=isolate,
            mounts=[*(parse.bind(one) for one in volume or []), *(parse.tmpfs(one) for one in tmpfs or [])],
            **{name: value for name, value in silent.items() if value is not None},
            **({"writable": "no"} if read_only else parse.writable(writable) if writable else {}),
        )
        if dry_run:
            from worker import dryrun  # with it comes the whole host, which slows every other run down

            found = dryrun.dry_run(spec, settings)
            (print_json if as_json else print_plan)(found)
            raise typer.Exit
        if attach and (count > 1 or as_json):
            raise BadInput(
                "--attach", "is for one sandbox, and for what it prints", "leave out -n and --json"
            )
        client = Client(settings)
        client.validate(spec)
        batch, ids = submit(client.app(), client.record, settings, [spec] * count, batch=batch_name)
        say(f"batch {batch}")
        if not client.record.live_hosts():
            say("no host is up: they wait as queued; start sandbatch up, or sandbatch worker")
        if attach:
            say(ids[0])  # our stdout is the sandbox's
            raise typer.Exit(follow_to_its_end(client, ids[0], forget=remove))
        if not as_json:
            out.print("\n".join(ids))
        states = wait_for(client, ids, "running", None) if wait else {}
        if as_json:
            print_json([shown(row) for row in client.record.get_all(ids)])
        if any(state not in (State.RUNNING, State.EXITED) for state in states.values()):
            raise tell_failures(client, ids)
