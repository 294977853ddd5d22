"""Fetches the images that the sandboxes of this host wait for; none of them holds a launch slot meanwhile.

A thread that listens, threads that resolve, and at most `settings.pulls` threads that pull. A pool process
hands a sandbox over by a datagram with its id, as to the keeper; the journal holds everything else. Who waits
for what stands in `worker.errands`: those of one batch that name the same reference share one look at the
registry, and those that need the same image share one pull.

Nothing here outlives the worker: skopeo and umoci die with it, and a new worker begins anew.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from worker import image_pull, journal
from worker.errands import ORDER, Errand, Errands, Pull, Turn, Wanted
from worker.errors import JournalError, SandbatchError
from worker.image_pull import Progress
from worker.image_ref import parse_image
from worker.image_store import ImageStore
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import CONTAINER_ID

log = logging.getLogger("sandbatch")
RESOLVERS = 8  # looks at registries at a time: a slow one must not hold up the others
TELLERS = 4
SHOW_S = 1.0  # between two words about the same pull
REFRESH_S = 10.0  # a word without news: it expires where it is kept
STOP_S = 5.0


@dataclass(frozen=True)
class Order:
    """A wish that this host has an image: of `sandbatch pull`, not of a sandbox."""

    reference: str
    policy: str


class Tell(Protocol):
    """What the tasks layer does. Each is called in a thread, and may raise when it cannot."""

    def pinned(self, batch: str, reference: str) -> str | None:
        """The digest that the batch runs, where one of its hosts has resolved the reference."""

    def pin(self, batch: str, reference: str, digest: str) -> str:
        """Have the batch run this digest; the one that counts is returned."""

    def fetched(self, container_id: str, attempt: int, outcome: str, detail: str, digest: str) -> None:
        """`outcome` is "fetched" or "failed"; `detail` says why in words."""

    def order(self, name: str) -> Order | None:
        """What an order asks for; None if it is over."""

    def carried_out(self, name: str, outcome: str, detail: str, digest: str) -> None: ...

    def progress(self, rows: list[dict[str, Any]]) -> None:
        """All that is pulled now, in the shape of `tasks.pulls.Pulls.pulls_on`; `orders` are names."""


def socket_path(settings: Settings) -> Path:
    return settings.run_dir / "fetcher.sock"


def hand_over(settings: Settings, name: str) -> None:
    """Ask this host's fetcher to look at a sandbox, or an order; reconcile asks again for what is lost."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(name.encode(), str(socket_path(settings)))


class Fetcher:
    """The pulls of one host."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self._settings = settings
        self._tell = tell
        self._store = ImageStore(settings)
        self._book = Errands()
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener = threading.Thread(target=self._listen, name="fetcher", daemon=True)
        self._shower = threading.Thread(target=self._show, name="fetcher-show", daemon=True)
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "fetcher-resolve")
        self._pullers = ThreadPoolExecutor(settings.pulls, "fetcher-pull")
        self._tellers = ThreadPoolExecutor(TELLERS, "fetcher-tell")

    def start(self) -> None:
        path = socket_path(self._settings)
        path.unlink(missing_ok=True)  # of a worker that was killed; the host lock says there is no other
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._listener.start()
        self._news.set()  # what the worker before has shown is over
        self._shower.start()

    def stop(self) -> None:
        """End all pulls, and wait until nothing of them is left; what waits goes on with the next worker."""
        self._stopping.set()
        self._book.close_all()
        self._news.set()
        hand_over(self._settings, "")  # wakes the listener
        for pool in (self._resolvers, self._pullers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._tellers.shutdown(wait=False, cancel_futures=True)
        for thread in (self._listener, self._shower):
            thread.join(timeout=STOP_S)
        self._socket.close()
        socket_path(self._settings).unlink(missing_ok=True)

    def look(self, name: str) -> None:
        """Look at a sandbox or an order: it waits from now on, or no more. Safe to repeat."""
        if name.startswith(ORDER):
            self._submit(self._tellers, self._look_at_order, name)
            return
        known = self._read(name)
        if known is None or not known.waits_for_image:
            self._book.drop(name)
            return
        asked, turn = known.asked, Turn(known.attempt, len(known.runs))
        digest = str(known.facts.get("image_digest") or "")
        if not self._book.was_told(name, turn):
            self._join(name, turn, Wanted("batch", known.batch, str(asked.image), asked.pull, digest))

    def look_again(self) -> None:
        """Look at all that wait: the datagram of an end may have been lost."""
        for name in self._book.names():
            if not name.startswith(ORDER):
                self.look(name)

    # -- who waits ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._stopping.is_set():
            name = self._socket.recv(256).decode(errors="replace")
            try:
                if name:
                    self.look(name)
            except Exception:  # a defect with one must not keep the others from being looked at
                log.exception("fetcher: %s cannot be looked at", name)

    def _read(self, name: str) -> Journal | None:
        if not CONTAINER_ID.fullmatch(name):
            return None
        try:
            return journal.read(self._settings.sandboxes_dir / name)
        except JournalError:
            return None  # it has ended; or cannot be read, which audit shows

    def _look_at_order(self, name: str) -> None:
        if not self._book.was_told(name, Turn()):
            order = self._tell.order(name)
            if order is not None:
                self._join(name, Turn(), Wanted("order", "", order.reference, order.policy))

    def _join(self, name: str, turn: Turn, wanted: Wanted) -> None:
        try:
            ref = parse_image(wanted.reference)
        except ValueError as error:  # of another release, or written by hand
            self._book.note_told(name, turn)
            self._say(name, turn, "failed", f"image {wanted.reference}: {error}", "")
            return
        new = self._book.join(name, turn, wanted, ref)
        if new is not None:
            self._submit(self._resolvers, self._resolve, new)
        self._news.set()

    # -- what is done for them ---------------------------------------------------------------------

    def _resolve(self, errand: Errand) -> None:
        """Find the digest, and have that pulled."""
        try:
            digest = errand.wanted.digest or errand.ref.digest or self._digest_of(errand)
        except SandbatchError as error:
            self._finish(errand, "failed", str(error), "")
            return
        except Exception as error:  # noqa: BLE001 - the broker is away: reconcile hands them over again
            log.warning("image %s waits: %s", errand.ref, error)
            self._book.close(errand, is_told=False)
            return
        new = self._book.meet(errand, digest)
        if new is not None:
            self._submit(self._pullers, self._pull, new)
        self._news.set()

    def _digest_of(self, errand: Errand) -> str:
        """The batch's pin; else what the policy says, and from now on that is the pin."""
        batch, reference = errand.wanted.batch, str(errand.ref)
        digest = self._tell.pinned(batch, reference) if batch else None
        if digest:
            return digest
        if errand.wanted.policy == "missing":
            digest = self._store.lookup(errand.ref)
        if not digest:
            timeout_s = self._settings.pull_timeout_s
            digest = image_pull.resolve(self._settings, errand.ref, timeout_s, errand.stop)
        return self._tell.pin(batch, reference, digest) if batch else digest

    def _pull(self, pull: Pull) -> None:
        def note(progress: Progress) -> None:
            pull.progress = progress
            self._news.set()

        outcome, detail = "failed", ""
        try:
            if not pull.stop.is_set():
                timeout_s = self._settings.pull_timeout_s
                image_pull.pull(
                    self._settings, pull.ref, pull.digest, timeout_s=timeout_s, progress=note, stop=pull.stop
                )
                outcome = "fetched"
        except SandbatchError as error:
            detail = str(error)
        except Exception as error:  # whatever it is, somebody waits for an outcome
            log.exception("image %s: its pull failed", pull.ref)
            detail = f"image {pull.ref}: cannot be pulled: {error}"
        for errand in self._book.close_pull(pull):
            self._finish(errand, outcome, detail, pull.digest)
        self._news.set()

    def _finish(self, errand: Errand, outcome: str, detail: str, digest: str) -> None:
        for name, turn in self._book.close(errand, is_told=True):
            self._say(name, turn, outcome, detail, digest)

    def _say(self, name: str, turn: Turn, outcome: str, detail: str, digest: str) -> None:
        """Tell in a thread what the book has as told; reconcile asks again for what could not be told."""

        def call() -> None:
            try:
                if name.startswith(ORDER):
                    self._tell.carried_out(name, outcome, detail, digest)
                else:
                    self._tell.fetched(name, turn.attempt, outcome, detail, digest)
            except Exception:
                self._book.forget_told(name)
                raise

        self._submit(self._tellers, call)

    def _submit(self, pool: ThreadPoolExecutor, call: Callable[..., None], *args: Any) -> None:
        def logged() -> None:
            try:
                call(*args)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the log
                log.warning("fetcher: put off: %s", error)

        with contextlib.suppress(RuntimeError):  # it has just been stopped
            pool.submit(logged)

    # -- what is shown -----------------------------------------------------------------------------

    def _show(self) -> None:
        """Say what is pulled now, once a second at most; and once more when it is nothing."""
        is_shown = False
        while not self._stopping.is_set():
            self._news.wait(REFRESH_S if is_shown else None)
            self._news.clear()
            rows = self._book.rows()
            try:
                self._tell.progress(rows)
            except Exception as error:  # noqa: BLE001 - it is shown again in a while, and expires
                log.info("progress of pulls is not shown: %s", error)
            is_shown = bool(rows)
            self._stopping.wait(SHOW_S)
