"""`sandbatch keys`: the secrets of a fleet whose broker is not to be root on every host."""

from pathlib import Path
from typing import Annotated

import typer

from cli.output import errors_for_humans, say
from worker.errors import BadInput

app = typer.Typer()


@app.command(
    epilog="Example: sandbatch keys fleet --broker redis.example:6379 --hosts h1,h2 --users alice,bob"
)
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New, or that of an earlier run.")],
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]", help="As hosts and users reach it: its certificate has this name."
        ),
    ] = None,
    hosts: Annotated[str, typer.Option(metavar="NAME,…", help="Of hosts, as in `sandbatch hosts`.")] = "",
    users: Annotated[str, typer.Option(metavar="NAME,…", help="Of those who may launch.")] = "",
    new_password: Annotated[
        str | None, typer.Option(metavar="cli|worker|flower", help="Change this login of the broker.")
    ] = None,
    no_tls: Annotated[bool, typer.Option("--no-tls", help="For a network that nobody else is in.")] = False,
) -> None:
    """Make certificates, logins of the broker and signing keys; print the folders to be copied.

    Run again with new names to add hosts and users: what is there stays.
    """
    from tasks.fleet_keys import BROKER_PLACE, FLOWER_PLACE, HOST_PLACE, USER_PLACE, write_keys

    with errors_for_humans():
        written = write_keys(
            folder, broker, _names(hosts), _names(users), has_tls=not no_tls, renew=new_password
        )
        places = {"broker": BROKER_PLACE, "flower": FLOWER_PLACE, "host": HOST_PLACE, "user": USER_PLACE}
        words = {
            "broker": f"there, for its redis alone, whose settings then include {BROKER_PLACE}/redis.conf",
            "flower": f"to where Flower runs; then: sandbatch --config {FLOWER_PLACE}/sandbatch.toml flower",
            "host": "to that host, as root",
            "user": f"to that user; then: export SANDBATCH_CONFIG={USER_PLACE}/sandbatch.toml",
        }
        for path in written.new:
            kind = path.name.partition("-")[0]
            print(path)
            say(f"  is {places[kind]}: copy it {words[kind]}")
        for path in written.trusted:
            print(path)
            say(f"  has new public keys: copy it to {HOST_PLACE}/trusted of that host; no restart is needed")
        for path in written.changed:
            print(path)
            say("  has a new password: copy it; the broker reads its file at ACL LOAD")
        say(f"keep the rest of {folder} from everybody: ca.key and fleet.json make all of this anew")


def _names(text: str) -> list[str]:
    names = [one.strip() for one in text.split(",") if one.strip()]
    if len(set(names)) != len(names):
        raise BadInput(f"names {text}", "one of them is given twice", "name each once")
    return names
