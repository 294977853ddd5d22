"""How stages, launches and sandboxes ended, told to the worker's main process for `/metrics`.

Stages run in the pool's processes, which are killed and replaced: a count of their own would be lost with
them. So each writes a line into a pipe of the main process when its journal has noted an outcome; the
durations are the journal's. Nobody waits for a reader: into a full pipe nothing is written, and the log
says so.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from worker import journal as journals
from worker.journal import Journal, StageRun, seconds
from worker.stages import STAGES

log = logging.getLogger("sandbatch")

VERBS = ("do", "undo")
# lost: its process ended before it did. cut: somebody ended a wait, for an image or an answer.
RESULTS = ("done", "failed", "lost", "cut")
STAGE_NAMES = ("place", *(stage.name for stage in STAGES))
BY_STAGE, OTHER = "stage", "other"
# Why sandboxes end: `stage` is a launch that failed, in the stage that the counts of stages name.
REASONS = (
    *(BY_STAGE, "refused", "exit", "stop", "ttl", "deadline", "oom"),
    *("rm", "cancel", "rescheduled", "lost", OTHER),
)
PIPE_BYTES = 2**20
_RESULT_OF = {"done": "done", "failed": "failed", "undone": "done", "undo-failed": "failed"}


class Counts(Protocol):
    """What is made of the lines."""

    def stage(self, stage: str, verb: str, result: str, duration_s: float) -> None: ...

    def launched(self, duration_s: float) -> None: ...

    def ended(self, state: str, reason: str) -> None: ...


@dataclass
class _Pipe:
    reader: int
    writer: int


_pipe: _Pipe | None = None  # of the main process; the pool's processes have it by their fork


def listen(counts: Counts) -> None:
    """Have the outcomes of this process, and of those that it forks from now on, counted by `counts`."""
    global _pipe
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)  # a stage waits for no reader
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError as error:  # of another user than root, with many pipes
        log.info("the pipe of the outcomes has the kernel's own size: %s", error)
    _pipe = _Pipe(reader, writer)
    journals.listener = _on_event
    threading.Thread(target=_read, args=(reader, counts), name="outcomes", daemon=True).start()


def _read(reader: int, counts: Counts) -> None:
    with open(reader, encoding="utf-8") as lines:
        for line in lines:
            what, *values = json.loads(line)
            getattr(counts, what)(*values)


# -- what is told ----------------------------------------------------------------------------------


def tell_place(result: str, duration_s: float) -> None:
    """`place`, which no journal has: it is what begins one."""
    _tell("stage", "place", "do", result, round(duration_s, 3))


def tell_end(state: str, reason: str) -> None:
    """The end of a sandbox; one that is refused has no journal."""
    _tell("ended", state, reason if reason in REASONS else OTHER)


def _on_event(journal: Journal, event: dict[str, Any]) -> None:
    kind, stage = event["event"], event.get("stage", "")
    if kind in _RESULT_OF:
        verb = "undo" if kind.startswith("undo") or kind == "undone" else "do"
        run = next(one for one in reversed(journal.runs) if (one.name, one.verb) == (stage, verb))
        _tell("stage", stage, verb, _RESULT_OF[kind], run.duration_s or 0.0)
        if (stage, kind) == ("ready", "done") and not journal.facts.get("restarts"):
            _tell("launched", round(max(0.0, seconds(event["t"]) - seconds(journal.created_at)), 3))
    elif kind in ("begun", "undo"):
        for run in _cut_short(journal, stage):
            is_wait = run.name == "ready" or bool(journal.facts.get("pulling"))
            took_s = max(0.0, seconds(event["t"]) - seconds(run.started_at))
            _tell(
                "stage", stage, run.verb, "cut" if is_wait and run.verb == "do" else "lost", round(took_s, 3)
            )
    elif kind == "facts" and event["facts"].get("final"):
        facts = journal.facts
        by_itself = BY_STAGE if facts.get("error") else OTHER
        tell_end(str(facts["final"]), str(facts.get("reason") or by_itself))


def _cut_short(journal: Journal, stage: str) -> Iterator[StageRun]:
    """What this stage did last before the run that has just begun, if that has no end."""
    before = [run for run in journal.runs if run.name == stage][:-1]
    if before and before[-1].ended_at is None:
        yield before[-1]


def _tell(*values: Any) -> None:
    if _pipe is None:
        return
    try:
        os.write(_pipe.writer, json.dumps(values).encode() + b"\n")  # below PIPE_BUF: whole or not at all
    except BlockingIOError:
        log.warning("the metrics miss an outcome: nobody has read the last %d", PIPE_BYTES // 50)
