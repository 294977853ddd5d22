"""Who waits for which image, for `worker.fetcher`: a book, without threads of its own.

An errand is what those of one batch share that name the same reference: it is resolved once. A pull is what
errands share that have come to the same digest of the same reference. What nobody waits for any more is
over at once: its `stop` is set, and whoever works on it ends.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from worker.image_pull import Progress
from worker.image_ref import ImageRef
from worker.journal import now

ORDER = "pull-"  # with which the names of orders begin
TOLD_S = 10.0  # the message of an outcome is on its way for so long: a second look fetches nothing again


class Turn(NamedTuple):
    """Which wait of a sandbox it is: an image may go again before it is used."""

    attempt: int = 0
    number: int = 0


class Wanted(NamedTuple):
    """What is to be fetched. `digest`: "" if that is still to be found out."""

    kind: str  # "batch", or "order": of `sandbatch pull`
    batch: str
    reference: str
    policy: str
    digest: str = ""


@dataclass(eq=False)
class Errand:
    """Those that want the same."""

    wanted: Wanted
    ref: ImageRef
    waiters: dict[str, Turn] = field(default_factory=dict)  # by name
    stop: threading.Event = field(default_factory=threading.Event)
    since: str = field(default_factory=now)
    pull: "Pull | None" = None


@dataclass(eq=False)
class Pull:
    """One image on its way here."""

    ref: ImageRef
    digest: str
    errands: list[Errand] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    since: str = field(default_factory=now)
    progress: Progress = field(
        default_factory=lambda: Progress("waiting", 0, None, 0, "for other pulls to end")
    )


class Errands:
    """The book of one host. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errands: dict[Wanted, Errand] = {}
        self._pulls: dict[tuple[str, str], Pull] = {}
        self._of: dict[str, Errand] = {}  # by name of a waiter
        self._told: dict[str, tuple[Turn, float]] = {}
        self._is_closed = False

    def names(self) -> list[str]:
        """All that wait."""
        with self._lock:
            return list(self._of)

    def join(self, name: str, turn: Turn, wanted: Wanted, ref: ImageRef) -> Errand | None:
        """Let one wait, unless it has just been told; the errand, if it is new and to be resolved."""
        with self._lock:
            if self._is_closed or self._is_told(name, turn):
                return None
            errand = self._of.get(name)
            if errand is not None and errand.wanted != wanted:
                self._drop(name)
            errand, new = self._errands.get(wanted), None
            if errand is None:
                errand = new = self._errands[wanted] = Errand(wanted, ref)
            errand.waiters[name] = turn
            self._of[name] = errand
            return new

    def drop(self, name: str) -> None:
        """It waits no more; what it was the last to wait for is over."""
        with self._lock:
            self._told.pop(name, None)
            self._drop(name)

    def meet(self, errand: Errand, digest: str) -> Pull | None:
        """Let an errand wait for an image; the pull of it, if it is new and to be carried out."""
        with self._lock:
            if errand.stop.is_set():
                return None
            key, new = (digest, str(errand.ref)), None
            pull = self._pulls.get(key)
            if pull is None:
                pull = new = self._pulls[key] = Pull(errand.ref, digest)
            pull.errands.append(errand)
            errand.pull = pull
            return new

    def close(self, errand: Errand, *, is_told: bool) -> list[tuple[str, Turn]]:
        """It is over; those that waited.

        `is_told`: they are told of its end, and a look at one of them, at the same time, begins no other.
        """
        with self._lock:
            waiters = list(errand.waiters.items())
            for name, turn in waiters:
                del self._of[name]
                if is_told:
                    self._note(name, turn)
            errand.waiters.clear()
            self._end(errand)
            return waiters

    def close_pull(self, pull: Pull) -> list[Errand]:
        """It is over; the errands that waited for it."""
        with self._lock:
            if self._pulls.get((pull.digest, str(pull.ref))) is pull:
                del self._pulls[pull.digest, str(pull.ref)]
            errands, pull.errands = pull.errands, []
            for errand in errands:
                errand.pull = None
            return errands

    def close_all(self) -> None:
        """Nobody is to be told any more, and nothing is begun."""
        with self._lock:
            self._is_closed = True
            for errand in list(self._errands.values()):
                for name in list(errand.waiters):
                    self._drop(name)

    def _drop(self, name: str) -> None:
        errand = self._of.pop(name, None)
        if errand is not None:
            del errand.waiters[name]
            if not errand.waiters:
                self._end(errand)

    def _end(self, errand: Errand) -> None:
        errand.stop.set()
        if self._errands.get(errand.wanted) is errand:
            del self._errands[errand.wanted]
        pull, errand.pull = errand.pull, None
        if pull is not None:
            pull.errands.remove(errand)
            if not pull.errands:
                pull.stop.set()
                if self._pulls.get((pull.digest, str(pull.ref))) is pull:
                    del self._pulls[pull.digest, str(pull.ref)]

    # -- who was told --------------------------------------------------------------------------------

    def note_told(self, name: str, turn: Turn) -> None:
        with self._lock:
            self._note(name, turn)

    def was_told(self, name: str, turn: Turn) -> bool:
        with self._lock:
            return self._is_told(name, turn)

    def _note(self, name: str, turn: Turn) -> None:
        moment = time.monotonic()
        self._told = {one: told for one, told in self._told.items() if told[1] > moment}
        self._told[name] = (turn, moment + TOLD_S)

    def _is_told(self, name: str, turn: Turn) -> bool:
        told, until = self._told.get(name, (None, 0.0))
        return told == turn and time.monotonic() < until

    def forget_told(self, name: str) -> None:
        with self._lock:
            self._told.pop(name, None)

    # -- what is shown -------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """What is under way, as `tasks.pulls.Pulls.pulls_on` has it."""
        resolving = Progress("resolving", 0, None, 1, "")
        with self._lock:
            new = [one for one in self._errands.values() if one.pull is None]
            rows = [_row([one], one.ref, None, resolving, one.since) for one in new]
            rows += [_row(p.errands, p.ref, p.digest, p.progress, p.since) for p in self._pulls.values()]
        return rows


def _row(
    errands: list[Errand], ref: ImageRef, digest: str | None, progress: Progress, since: str
) -> dict[str, Any]:
    names = [name for errand in errands for name in errand.waiters]
    orders = [name for name in names if name.startswith(ORDER)]
    return {
        "reference": str(ref),
        "digest": digest,
        "phase": progress.phase,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "tries": progress.tries,
        "words": progress.words,
        "batches": sorted({errand.wanted.batch for errand in errands if errand.wanted.batch}),
        "waiters": len(names) - len(orders),
        "orders": orders,
        "since": since,
    }
