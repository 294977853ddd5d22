"""`sandbatch run --attach`: print what one sandbox writes, and exit as it does."""

import signal
from types import FrameType
from typing import Any

from cli.calls import LogPrinter, pipes
from cli.client import Client
from cli.output import say
from cli.waiting import tell_failures
from tasks.state import TERMINAL, State
from tasks.submit import remove, stop
from worker.errors import Refused

INTERRUPTED, TERMINATED = 130, 143


class _Interrupts:
    """SIGINT and SIGTERM, both as KeyboardInterrupt; which came first decides the exit code."""

    def __init__(self, printer: LogPrinter) -> None:
        self.code, self._printer = 0, printer

    def catch(self) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or (TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        self._printer.interrupt()


def attach(client: Client, container_id: str, *, forget: bool) -> int:
    """Follow one sandbox from its beginning to its end; its exit code.

    The first Ctrl-C asks it to stop and goes on until it has; the second leaves it to that.
    """
    printer = LogPrinter(client, container_id, {}, follow=True)
    interrupts = _Interrupts(printer)
    interrupts.catch()
    try:
        row = _to_its_end(client, printer)
    except KeyboardInterrupt:
        asked = client.record.get(container_id)
        if asked is not None:
            stop(client.app(), client.record, [asked])
        say("sandbatch: it is asked to stop; Ctrl-C again does not wait for that")
        try:
            row = _to_its_end(client, printer)
        except KeyboardInterrupt:
            return interrupts.code
    if forget:
        remove(client.app(), client.record, [row])
    if interrupts.code:
        return interrupts.code
    if row["state"] == State.FAILED:
        return tell_failures(client, [container_id], row["exit_code"] or 0).exit_code
    return int(row["exit_code"] or 0)


def _to_its_end(client: Client, printer: LogPrinter) -> dict[str, Any]:
    """Print the log to its end, and wait for the sandbox's."""
    with pipes():
        try:
            printer.run()
        except Refused as refused:
            row = client.record.get(printer.container_id)
            if row is None or row["state"] not in TERMINAL:
                raise
            if row["exit_code"] is not None:  # it has run, and what it wrote cannot be had any more
                say(f"sandbatch: {refused}")
        client.wait([printer.container_id], "terminal", None)
    row = client.record.get(printer.container_id)
    if row is None:  # its record has expired
        raise Refused(printer.container_id, "its record is gone", "see sandbatch ls")
    return row
