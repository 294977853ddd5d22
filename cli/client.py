"""What the commands without root do with the broker: find, validate, wait."""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from cli.away import Away
from cli.output import say
from cli.parse import pair
from tasks import rows as light
from tasks.connection import check, connect
from tasks.record import Record
from tasks.state import TERMINAL, UNKNOWN, State
from worker.errors import BadInput
from worker.settings import Settings

if TYPE_CHECKING:  # a command that sends nothing has no time for Celery
    from celery import Celery

    from worker.spec import Spec

FOLLOW_S = 2.0  # shorter than the socket's timeout; then the wait begins anew


class Client:
    """The broker as the command line sees it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        connection = connect(settings)
        check(connection, settings)
        self.record = Record(connection)
        self._hosts: dict[str, dict[str, Any]] | None = None
        self._warned: set[str] = set()

    def app(self) -> "Celery":
        """A Celery app that only sends; without a result backend it subscribes to nothing."""
        from tasks.app import make_app

        return make_app(self.settings, "client")

    def resolve(self, given: Iterable[str], *, unknown_ok: bool = False) -> list[dict[str, Any]]:
        """Sandboxes by id, or by a prefix that only one id has.

        Raises:
            BadInput: No such id, unless `unknown_ok`, or several begin so.
        """
        known = self.record.ids()
        matches = {
            text: [text] if text in known else [one for one in known if text and one.startswith(text)]
            for text in given
        }
        # The index may still have an id whose record has expired.
        rows = {row["id"]: row for row in self.record.get_all(sorted({*chain(*matches.values())}))}
        found: dict[str, dict[str, Any]] = {}
        for text, ids in matches.items():
            live = [one for one in ids if one in rows]
            if not live and not unknown_ok:
                raise BadInput(text or "id ''", "no such sandbox", "see sandbatch ls")
            if len(live) > 1:
                raise BadInput(text, f"{len(live)} sandboxes begin so", "give more of the id")
            found |= {one: rows[one] for one in live}
        return list(found.values())

    def select(
        self,
        ids: Sequence[str] = (),
        *,
        batch: str | None = None,
        host: str | None = None,
        states: Sequence[str] = (),
        labels: Sequence[str] = (),
        unknown_ok: bool = False,
    ) -> list[dict[str, Any]]:
        """Sandboxes by any of what `ls` filters by, in full."""
        keep = _filter(batch, host, states, labels)
        if ids:
            rows = [row for row in self.resolve(ids, unknown_ok=unknown_ok) if keep(row)]
        elif batch is None and host is None and not states and not labels:
            rows = self.record.get_all()
        else:
            found = light.read(self.record, with_labels=bool(labels))
            matching = [row["id"] for row in found if keep(row)]
            rows = [row for row in self.record.get_all(matching) if keep(row)]
        return _known(batch, rows, unknown_ok=unknown_ok)

    def rows(
        self,
        *,
        batch: str | None = None,
        host: str | None = None,
        states: Sequence[str] = (),
        labels: Sequence[str] = (),
    ) -> list[light.Row]:
        """As `select`, with no more than a table shows: a fraction of the time for thousands."""
        keep = _filter(batch, host, states, labels)
        return _known(batch, [row for row in light.read(self.record, with_labels=bool(labels)) if keep(row)])

    def validate(self, spec: "Spec") -> None:
        """Refuse what no host can do, before anything is enqueued (`cli.validate`)."""
        from cli.refused import explain_network
        from cli.validate import validate, warnings

        if self._hosts is None:  # once: a file may have a thousand different specs
            self._hosts = self.record.all_hosts()
        try:
            validate(spec, self._hosts, self.settings)
        except BadInput as error:
            raise explain_network(error) from None
        for words in warnings(spec, self._hosts):
            if words not in self._warned:
                self._warned.add(words)
                say(words)

    def next_change(self, mark: str) -> str:
        """Wait until something changes after `mark` of the stream; the new mark."""
        while True:
            entries = [entry for entry, _ in self.record.follow(mark, FOLLOW_S)]
            if entries:
                return entries[-1]

    def wait(
        self,
        ids: Sequence[str],
        goal: str,
        timeout_s: float | None,
        on_change: Callable[[dict[str, str]], None] = lambda states: None,
    ) -> dict[str, str]:
        """Wait by events until each sandbox has reached `goal` ("running" or "terminal") or its end.

        Returns the states when all have, or when the time is up. What is launched elsewhere meanwhile, as
        its host was lost, stands there by its new id.
        """
        mark = self.record.last_event()  # before the look: nothing between the two is missed
        away = Away(self.record, follows=goal != "gone")
        states = away.begin(ids)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        on_change(states)
        while not all(has_reached(state, goal) for state in states.values()):
            left_s = FOLLOW_S if deadline is None else min(FOLLOW_S, deadline - time.monotonic())
            if left_s <= 0:
                break
            changed = False
            for entry, event in self.record.follow(mark, left_s):
                mark = entry
                if event["id"] in states:
                    states[event["id"]] = event["state"]
                    changed = True
            changed |= away.look(states)
            if changed:
                on_change(states)
        return states


def _filter(
    batch: str | None, host: str | None, states: Sequence[str], labels: Sequence[str]
) -> Callable[[dict[str, Any]], bool]:
    """What `ls` filters by, as one question to a row."""
    for state in states:
        if state not in {*State, UNKNOWN}:
            raise BadInput(f"--state {state}", "no such state", f"one of {', '.join([*State, UNKNOWN])}")
    wanted = dict(pair(label, "--label") for label in labels)
    return lambda row: (
        (batch is None or row["batch"] == batch)
        and (host is None or row["host"] == host)
        and (not states or row["state"] in states)
        and all(row["labels"].get(name) == value for name, value in wanted.items())
    )


def _known(
    batch: str | None, rows: list[dict[str, Any]], *, unknown_ok: bool = False
) -> list[dict[str, Any]]:
    if batch is not None and not rows and not unknown_ok:
        raise BadInput(f"batch {batch}", "no such batch", "see sandbatch ls")
    return rows


def has_reached(state: str, goal: str) -> bool:
    """`gone` gives up on the stuck: their host goes on trying, perhaps for ever."""
    if goal == "running":
        return state in TERMINAL or state in (State.RUNNING, State.STUCK)
    return state in TERMINAL or (goal == "gone" and state == State.STUCK)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the exact shape of CLI.md's `--json`."""
    return {name: value for name, value in row.items() if name != "spec"}
