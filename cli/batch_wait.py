"""Wait for a batch by its events: a live bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import typer

from cli import report
from cli.away import Away
from cli.client import FOLLOW_S, Client, has_reached
from cli.output import say
from tasks.state import TERMINAL, State
from worker.settings import Settings

LINE_S = 10.0  # between two lines where no terminal is
PACE_S = 30.0  # what the rate is measured over
FAILURES_TOLD = 20
WORDS = {
    State.QUEUED: "queued",
    State.PLACED: "launching",
    State.LAUNCHING: "launching",
    State.RESTARTING: "launching",
    State.RUNNING: "running",
    State.STOPPING: "running",
    State.UNDOING: "launching",
    State.EXITED: "done",
    State.CANCELLED: "cancelled",
    State.FAILED: "failed",
}
SHOWN = ("queued", "launching", "running", "done", "failed")  # in this order; others where there are some


class Progress:
    """How far a batch is: what each of its sandboxes is at, and how fast they get on."""

    def __init__(self, name: str, goal: str, states: dict[str, str], *, is_counted: bool) -> None:
        self.name, self.goal, self.states = name, goal, states
        self.is_counted = is_counted  # its outcome will be told; those of release 0.1.0 have none
        self.replaced: set[str] = set()
        self.outcome: str | None = None
        self.count()
        self.pace = deque([(time.monotonic(), self.reached)])

    def count(self) -> None:
        """Count the states from the beginning."""
        self.counts = Counter(map(_word, self.states.values()))
        self.reached = sum(has_reached(one, self.goal) for one in self.states.values())

    def look(self, away: Away) -> bool:
        """Take in what the silence of hosts, and their return, mean; False if that changes nothing."""
        before = set(self.states)
        if not away.look(self.states):
            return False
        self.replaced |= before - set(self.states)
        self.count()
        return True

    def hear(self, event: dict[str, str]) -> bool:
        """Take an event in; False if it is of no interest."""
        if event["batch"] != self.name or event["id"] in self.replaced:
            return False
        if not event["id"]:
            self.outcome = event["state"]
            return True
        old, new = self.states.get(event["id"]), event["state"]
        if old is not None:
            self.counts[_word(old)] -= 1
            self.reached -= has_reached(old, self.goal)
        self.states[event["id"]] = new  # perhaps one in the place of another, which was lost
        self.counts[_word(new)] += 1
        self.reached += has_reached(new, self.goal)
        return True

    @property
    def is_over(self) -> bool:
        goes_by_states = self.goal == "running" or not self.is_counted
        return self.outcome is not None or (goes_by_states and self.reached == len(self.states))

    def rate(self) -> float:
        """Sandboxes a second that get there."""
        now_s = time.monotonic()
        if self.pace[-1][1] != self.reached:
            self.pace.append((now_s, self.reached))
        while len(self.pace) > 2 and now_s - self.pace[1][0] > PACE_S:
            self.pace.popleft()
        begun_s, reached = self.pace[0]
        return (self.reached - reached) / max(0.001, now_s - begun_s)

    def __str__(self) -> str:
        more = [word for word in sorted(self.counts) if self.counts[word] and word not in SHOWN]
        return ", ".join(f"{self.counts[word]} {word}" for word in (*SHOWN, *more))

    def speed(self) -> str:
        """Rate and time left, in words."""
        rate, left = self.rate(), len(self.states) - self.reached
        return f"{rate:.1f}/s, {_clock(left / rate) if rate and left else '-'} left"


class Show(Protocol):
    """Shows a progress; `changed`: there is something new to it."""

    def __call__(self, changed: bool) -> None: ...


def follow(client: Client, name: str, goal: str, timeout_s: float | None) -> Progress:
    """Wait until a batch has come to `goal` ("running" or "terminal"), or the time is up."""
    mark = client.record.last_event()  # before the look: nothing between the two is missed
    batch = client.record.batch(name)
    ids = client.record.batch_ids(name)
    away = Away(client.record, follows=True)
    states = away.begin(ids or [row["id"] for row in client.rows(batch=name)])
    progress = Progress(name, goal, states, is_counted=batch is not None)
    progress.outcome = batch["outcome"] if batch else None
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _bar(progress) if sys.stderr.isatty() else _lines(progress) as show:
        show(True)
        while not progress.is_over:
            left_s = FOLLOW_S if deadline is None else min(FOLLOW_S, deadline - time.monotonic())
            if left_s <= 0:
                break
            changed = False
            for entry, event in client.record.follow(mark, left_s):
                mark = entry
                changed = progress.hear(event) or changed
            changed = progress.look(away) or changed
            show(changed)
    return progress


@contextmanager
def _bar(progress: Progress) -> Iterator[Show]:
    from rich import progress as rich
    from rich.text import Text

    from cli.output import err

    class Bar(rich.Progress):
        words = ""  # a text: it is drawn by another thread than that which counts

        def get_renderables(self) -> Iterator[Any]:
            yield Text(self.words, no_wrap=True, overflow="ellipsis")
            yield from super().get_renderables()

    columns = (
        rich.BarColumn(bar_width=30),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[speed]}"),
        rich.TimeElapsedColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=len(progress.states), speed="")

        def show(changed: bool) -> None:
            bar.words = f"batch {progress.name}: {progress}"
            total = max(1, len(progress.states))
            bar.update(task, completed=progress.reached, total=total, speed=progress.speed())

        yield show


@contextmanager
def _lines(progress: Progress) -> Iterator[Show]:
    last_s, is_new = 0.0, False

    def show(changed: bool) -> None:
        nonlocal last_s, is_new
        is_new = is_new or changed
        now_s = time.monotonic()
        if is_new and now_s - last_s >= LINE_S and not progress.is_over:
            say(f"batch {progress.name}: {progress}; {progress.speed()}")
            last_s, is_new = now_s, False

    yield show


def wait_for_batch(
    settings: Settings,
    name: str,
    goal: str = "terminal",
    timeout_s: float | None = None,
    *,
    report_to: Path | None = None,
    with_codes: bool = False,
) -> int:
    """Wait for a batch, say how it ended, write the report; the exit code.

    That is 0 if its rule is kept; without a rule (`run`), as long as none failed. Ctrl-C leaves it alone.
    """
    if report_to is not None:
        report.check(report_to)
    client = Client(settings)
    try:
        progress = follow(client, name, goal, timeout_s)
    except KeyboardInterrupt:
        say(f"batch {name} goes on: sandbatch wait --batch {name}, or sandbatch cancel {name}")
        raise typer.Exit(130) from None
    ids = client.record.batch_ids(name)  # with those in the place of others that were lost
    rows = client.record.get_all(ids or list(progress.states))
    batch = client.record.batch(name) or {"name": name, "needed": None, "outcome": progress.outcome}
    if with_codes and goal == "terminal":
        for row in rows:
            if row["exit_code"] is not None and row["state"] in TERMINAL:
                print(f"{row['id']} {row['exit_code']}")
    if report_to is not None:
        report.write(report_to, batch, rows)
    return _verdict(progress, batch, rows)


def _verdict(progress: Progress, batch: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    goal, states = progress.goal, [row["state"] for row in rows]
    good_states = {State.EXITED, State.RUNNING if goal == "running" else State.CANCELLED}
    good = sum(state in good_states for state in states)
    late = sum(state not in good_states and state not in TERMINAL for state in states)
    if batch["outcome"]:
        counts = f"{batch['good']} good, {batch['bad']} bad of {batch['total']}"
        say(f"batch {progress.name} {batch['outcome']}: {counts}")
    if late and not progress.is_over:
        say(f"sandbatch: wait: {late} of {len(states)} not there yet; see sandbatch ls")
    failed = [row for row in rows if row["error"]]
    for row in failed[:FAILURES_TOLD]:
        error = row["error"]
        say(f"sandbatch: {row['id']}: {row['state']} at {error['stage']}: {error['message']}")
    if len(failed) > FAILURES_TOLD:
        more = f"{len(failed) - FAILURES_TOLD} more have an error"
        say(f"sandbatch: batch {progress.name}: {more}; see sandbatch ls --batch {progress.name}")
    if batch["needed"] is None:
        return 0 if good == len(states) else 1
    if batch["outcome"]:
        return 0 if batch["outcome"] == "succeeded" else 1
    return 0 if progress.is_over and good >= batch["needed"] else 1


def _word(state: str) -> str:
    return WORDS.get(State(state), state) if state in set(State) else state


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
