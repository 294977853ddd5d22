"""How errors and answers reach people and programs, in one place."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import typer
from kombu.exceptions import OperationalError
from rich.console import Console

from worker.errors import SandbatchError

# No terminal, no width: a table in a pipe or a log is never cut.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
err = Console(stderr=True, highlight=False, soft_wrap=True)
debug = False  # set by --debug


def say(message: str) -> None:
    """A line of progress, for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout; a line each for streams."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def one_line(text: str) -> str:
    """The text with what would break its line, or is no text, written as Python writes it."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def fail(what: str, why: str, todo: str, code: int) -> typer.Exit:
    """Print the one line of an error; raise what this returns."""
    say(one_line(f"sandbatch: {what}: {why}" + (f"; {todo}" if todo else "")))
    return typer.Exit(code)


@contextmanager
def errors_for_humans() -> Iterator[None]:
    """One line for what is known to go wrong; a traceback only with --debug."""
    try:
        yield
    except SandbatchError as error:
        if debug:
            traceback.print_exc()
        say(one_line(f"sandbatch: {error}"))
        raise typer.Exit(error.exit_code) from None
    except (redis.RedisError, OperationalError) as error:
        if debug:
            traceback.print_exc()
        raise fail(
            "broker", str(error).split("\n")[0][:200], "check that it runs, and try again", 1
        ) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
