"""`sandbatch images`, `image ls`, `image rm`, `image prune`: what hosts have unpacked of images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import lines, parse, render
from cli.client import Client
from cli.image_hosts import Errors, ask, choose, tell
from cli.output import errors_for_humans, print_json, print_json_rows, say
from worker.errors import BadInput, SandbatchError
from worker.image_ref import ImageRef, absolute, parse_image
from worker.image_store import PREFIX
from worker.limits import rough
from worker.settings import load_settings

app = typer.Typer()
image = typer.Typer(
    no_args_is_help=True,
    help="The images of the hosts. To have one pulled: sandbatch pull.",
    epilog="Example: sandbatch image prune --older-than 7d",
)
app.add_typer(image, name="image")

Host = Annotated[str | None, typer.Option(metavar="HOST", help="Only of this host; else of all that are up.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only their digests.")]
Rows = list[dict[str, Any]]

HEADER = ("HOST", "REFERENCE", "DIGEST", "SIZE", "USES", "LAST USED")
DIGEST_SHOWN = 12  # digits, as docker's


@app.command(epilog="Example: sandbatch images --host build-7")
def images(host: Host = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """List the images that hosts have: reference, digest, size, how many sandboxes use it, last use."""
    _list(host, quiet=quiet, as_json=as_json)


@image.command("ls", epilog="Example: sandbatch image ls --json")
def image_ls(host: Host = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """The same as `sandbatch images`."""
    _list(host, quiet=quiet, as_json=as_json)


@image.command("rm", epilog="Example: sandbatch image rm busybox:1.36 4bcff63911fc --host build-7")
def image_rm(
    names: Annotated[
        list[str], typer.Argument(metavar="REF|DIGEST…", help="A reference, or 6 or more digits of a digest.")
    ],
    host: Host = None,
    as_json: Json = False,
) -> None:
    """Remove images, each with all its references, from the hosts that have them. Prints `HOST DIGEST` lines.

    An image that a sandbox uses stays, and the sandbox is named: exit 1, as for one that no host has.
    """
    with errors_for_humans():
        meant = {text: _read(text) for text in names}
        client = Client(load_settings())
        hosts, errors = choose(client, host, "image rm")
        answers, silent = ask(client.settings, "images", {name: {} for name in hosts})
        errors |= silent
        rows = _rows({name: answer["images"] for name, answer in answers.items()})
        wanted = {text: _matching(text, words, rows) for text, words in meant.items()}
        gone: Rows = []
        is_lacking = False
        for text, found in wanted.items():
            if not found:
                is_lacking = True
                say(f"sandbatch: image {text}: is not on {_where(host)}; see sandbatch images")
                continue
            known = {(row["host"], row["digest"]) for row in gone}  # by another of its names
            rest = [row for row in found if (row["host"], row["digest"]) not in known]
            asked = {row["host"]: {"digest": row["digest"]} for row in rest}
            removed, refused = ask(client.settings, "image-rm", asked)
            # The host was asked by the digest; he who reads it has another name for it.
            tell({name: _of(text, error) for name, error in refused.items()})
            is_lacking |= bool(refused)
            gone += _rows({name: answer["images"] for name, answer in removed.items()})
        _tell_freed(gone, as_json)
        _end(errors, is_lacking)


@image.command("prune", epilog="Example: sandbatch image prune --older-than 7d")
def image_prune(
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Only those not used for so long, such as 90m or 7d.")
    ] = "0",
    host: Host = None,
    as_json: Json = False,
) -> None:
    """Remove the images that no sandbox uses. Prints `HOST DIGEST` lines, and how much was freed."""
    with errors_for_humans():
        older_than_s = parse.duration(older_than, "--older-than")
        if not 0 <= older_than_s <= 10**10:
            raise BadInput(f"--older-than {older_than}", "a time is needed", "for example 90m or 7d")
        client = Client(load_settings())
        hosts, errors = choose(client, host, "image prune")
        fields = {"older_than_s": older_than_s}
        answers, silent = ask(client.settings, "image-prune", dict.fromkeys(hosts, fields))
        gone = _rows({name: answer["images"] for name, answer in answers.items()})
        _tell_freed(gone, as_json)
        if not gone and answers:
            say("there is nothing to remove")
        _end(errors | silent)


def _of(text: str, error: SandbatchError) -> SandbatchError:
    return SandbatchError(f"image {text}", error.why, error.todo) if isinstance(error, BadInput) else error


def _list(host: str | None, *, quiet: bool, as_json: bool) -> None:
    with errors_for_humans():
        client = Client(load_settings())
        hosts, errors = choose(client, host, "images")
        answers, silent = ask(client.settings, "images", {name: {} for name in hosts})
        rows = _rows({name: answer["images"] for name, answer in answers.items()})
        if as_json:
            print_json_rows(rows)
        elif quiet:
            for digest in dict.fromkeys(row["digest"] for row in rows):
                print(digest)
        else:
            print(lines.columns(HEADER, [cells for row in rows for cells in _cells(row)]))
        for name, answer in answers.items():
            if answer.get("why"):
                say(f"sandbatch: host {name}: {answer['why']}")
        _end(errors | silent)


def _rows(images: dict[str, Rows]) -> Rows:
    return [{"host": name, **row} for name, rows in images.items() for row in rows]


def _cells(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each reference; the image is one and the same."""
    uses = "?" if row["uses"] is None else str(row["uses"])
    rest = (short(row["digest"]), rough(row["size_bytes"]), uses, f"{render.age(row['used_at'])} ago")
    return [(row["host"], reference, *rest) for reference in row["references"] or ["<none>"]]


def short(digest: str) -> str:
    """As people compare digests, and as `image rm` takes them."""
    return digest.removeprefix("sha256:")[:DIGEST_SHOWN]


def _read(text: str) -> tuple[str, ImageRef | None]:
    """The beginning of a digest, or "", and a reference, if it may be one.

    Raises:
        BadInput: It is neither.
    """
    match = PREFIX.match(text)
    if match is None:
        return "", read_reference(text)
    try:
        return f"sha256:{match[1]}", parse_image(text)
    except ValueError:  # 64 digits are no reference
        return f"sha256:{match[1]}", None


def _matching(text: str, meant: tuple[str, ImageRef | None], rows: Rows) -> Rows:
    """Of the images of all hosts those that are meant; digits go before a name.

    Raises:
        BadInput: Several digests begin with these digits.
    """
    digits, ref = meant
    found = [row for row in rows if digits and row["digest"].startswith(digits)]
    if len({row["digest"] for row in found}) > 1:
        raise BadInput(f"image {text}", "several digests begin so", "give more digits")
    if found or ref is None:
        return found
    return [row for row in rows if ref.digest == row["digest"] or str(ref) in row["references"]]


def read_reference(text: str) -> ImageRef:
    """An image as a user names it, its path taken from where he is.

    Raises:
        BadInput: It is none.
    """
    try:
        return parse_image(absolute(text, Path.cwd()))
    except ValueError as error:
        raise BadInput(f"image {text}", str(error), "correct it") from None


def _tell_freed(gone: Rows, as_json: bool) -> None:
    if as_json:
        print_json(gone)
    else:
        for row in gone:
            print(f"{row['host']} {row['digest']}")
    count, size = len(gone), sum(row["size_bytes"] for row in gone)
    if gone:
        say(f"{count} image{'' if count == 1 else 's'} removed, {rough(size)} freed")


def _where(host: str | None) -> str:
    return "any host" if host is None else f"host {host}"


def _end(errors: Errors, is_lacking: bool = False) -> None:
    tell(errors)
    if errors or is_lacking:
        raise typer.Exit(1)
