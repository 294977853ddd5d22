"""How errors and answers reach people and programs, in one place."""

import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from worker.errors import SandbatchError

if TYPE_CHECKING:
    from rich.console import Console

    out: Console
    err: Console

debug = False  # set by --debug


def __getattr__(name: str) -> Any:
    """`out` and `err`, made when first asked for: rich takes longer to import than most commands to run."""
    if name not in ("out", "err"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from rich.console import Console

    # No terminal, no width: a table in a pipe or a log is never cut.
    width = None if name == "err" or sys.stdout.isatty() else 1000
    made = Console(stderr=name == "err", highlight=False, soft_wrap=True, width=width)
    globals()[name] = made
    return made


def say(message: str) -> None:
    """A line of progress, for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout; a line each for streams."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_json_rows(rows: Iterable[Any]) -> None:
    """One JSON document, a list, on stdout, an object a line: `indent` is ten times as slow."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    print(f"[\n{lines}\n]" if lines else "[]")


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
    except _broker_errors() as error:
        if debug:
            traceback.print_exc()
        raise fail(
            "broker", str(error).split("\n")[0][:200], "check that it runs, and try again", 1
        ) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _broker_errors() -> tuple[type[Exception], ...]:
    """What redis and kombu raise; a command that has not imported them cannot meet it."""
    names = (("redis", "RedisError"), ("kombu.exceptions", "OperationalError"))
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
