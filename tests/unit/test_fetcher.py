"""The fetcher: who waits for an image, with whom, and what they are told. Registry and store are doubles."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from worker import fetcher as module
from worker import journal as journals
from worker.errands import Errands, Turn, Wanted
from worker.errors import ImageError
from worker.fetcher import Fetcher, Order, hand_over
from worker.image_pull import Progress
from worker.image_ref import parse_image
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import make_spec

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
BUSYBOX, OTHER = "docker.io/library/busybox:latest", "docker.io/library/other:latest"
SOON_S = 10.0
QUIET_S = 0.2
ORDER = "pull-00000000000000aa"


class Registry:
    """What `worker.image_pull` does: resolves at once, and pulls when it is let."""

    def __init__(self) -> None:
        self.digests = {BUSYBOX: ONE, OTHER: TWO}
        self.resolved: list[str] = []
        self.pulls: queue.Queue[tuple[str, threading.Event]] = queue.Queue()  # begun: digest, its stop
        self.ended: list[str] = []
        self.go = threading.Event()
        self.error: Exception | None = None

    def resolve(self, settings: Settings, ref: Any, timeout_s: float, stop: threading.Event) -> str:
        self.resolved.append(str(ref))
        return self.digests[str(ref)]

    def pull(self, settings, ref, digest, *, timeout_s, progress, stop) -> None:
        progress(Progress("pulling", 5, 10, 1, ""))
        self.pulls.put((digest, stop))
        while not stop.is_set() and not self.go.wait(0.01):
            pass
        self.ended.append("stopped" if stop.is_set() else "through")
        if self.error is not None:
            raise self.error

    def begun(self) -> tuple[str, threading.Event]:
        return self.pulls.get(timeout=SOON_S)


class Told:
    """What the fetcher tells; and the record's pins and orders."""

    def __init__(self) -> None:
        self.pins: dict[tuple[str, str], str] = {}
        self.orders: dict[str, Order] = {}
        self.heard: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.shown: queue.Queue[list[dict[str, Any]]] = queue.Queue()
        self.is_away = False

    def _there(self) -> None:
        if self.is_away:
            raise ConnectionError("the broker is away")

    def pinned(self, batch: str, reference: str) -> str | None:
        self._there()
        return self.pins.get((batch, reference))

    def pin(self, batch: str, reference: str, digest: str) -> str:
        self._there()
        return self.pins.setdefault((batch, reference), digest)

    def fetched(self, *told: Any) -> None:
        self._there()
        self.heard.put(told)

    def order(self, name: str) -> Order | None:
        return self.orders.get(name)

    def carried_out(self, *told: Any) -> None:
        self.heard.put(told)

    def progress(self, rows: list[dict[str, Any]]) -> None:
        self.shown.put(rows)

    def next(self) -> tuple[Any, ...]:
        return self.heard.get(timeout=SOON_S)

    def is_silent(self) -> bool:
        try:
            return self.heard.get(timeout=QUIET_S) is None
        except queue.Empty:
            return True


@pytest.fixture
def registry(monkeypatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(module.image_pull, "resolve", made.resolve)
    monkeypatch.setattr(module.image_pull, "pull", made.pull)
    return made


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def here(settings) -> Settings:
    return settings.model_copy(update={"pulls": 2})


@pytest.fixture
def fetcher(here, registry, told) -> Iterator[Fetcher]:
    made = Fetcher(here, told)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def waiting(here) -> Callable[..., Journal]:
    """Journals of sandboxes that wait for their image."""

    def make(image: str = BUSYBOX, batch: str = "b-1", attempt: int = 1, **facts: Any) -> Journal:
        number = sum(1 for _ in here.sandboxes_dir.iterdir()) if here.sandboxes_dir.is_dir() else 0
        known = journals.create(
            here.sandboxes_dir,
            f"sb-{number:016x}",
            attempt=attempt,
            batch=batch,
            spec=make_spec(args=["true"], image=image, pull=facts.pop("pull", "missing")),
        )
        known.mark_begun("image", {"reference": image, "digest": None})
        known.set_facts(pulling=True, **facts)
        return known

    return make


def test_ten_that_need_one_image_share_one_look_and_one_pull(fetcher, here, registry, told, waiting):
    ids = [waiting().container_id for _ in range(10)]
    for one in ids[:5]:
        hand_over(here, one)
    assert registry.begun()[0] == ONE
    for one in ids[5:] + ids:
        fetcher.look(one)
    registry.go.set()
    assert sorted(told.next() for _ in ids) == [(one, 1, "fetched", "", ONE) for one in ids]
    assert told.is_silent()
    assert (registry.resolved, registry.ended) == ([BUSYBOX], ["through"])


def test_a_look_beside_the_end_of_a_pull_begins_no_other():
    """CI saw one of ten told twice: it was looked at after the end, and before that was noted."""
    book, ref, wanted = Errands(), parse_image("busybox"), Wanted("batch", "b-1", "busybox", "missing")
    turns = [(f"sb-{number}", Turn(1, number)) for number in range(10)]
    (errand, *_) = [book.join(name, turn, wanted, ref) for name, turn in turns]
    assert errand is not None
    assert book.close(errand, is_told=True) == turns
    assert [book.join(name, turn, wanted, ref) for name, turn in turns] == [None] * 10
    assert book.names() == []
    again = book.join("sb-0", Turn(2, 0), wanted, ref)  # it waits anew
    assert again is not None
    book.close(again, is_told=False)  # the broker was away
    assert book.join("sb-0", Turn(2, 0), wanted, ref) is not None


def test_batches_resolve_by_themselves_and_share_a_pull(fetcher, registry, told, waiting):
    """A tag may have moved since; the digest says whether it is the same image."""
    told.pins["b-3", BUSYBOX] = ONE
    known = [waiting(batch=f"b-{number}") for number in (1, 2, 3)]
    for one in known:
        fetcher.look(one.container_id)
    assert registry.begun()[0] == ONE
    registry.go.set()
    assert {told.next()[4] for _ in known} == {ONE}
    assert registry.resolved == [BUSYBOX, BUSYBOX]  # b-3 knows
    assert told.pins == dict.fromkeys([(f"b-{number}", BUSYBOX) for number in (1, 2, 3)], ONE)


def test_another_host_s_pin_counts_more_than_what_the_registry_says_now(fetcher, registry, told, waiting):
    told.pins["b-1", BUSYBOX] = TWO
    fetcher.look(waiting().container_id)
    assert registry.begun()[0] == TWO
    assert registry.resolved == []


def test_a_sandbox_that_knows_its_digest_asks_nobody(fetcher, registry, told, waiting):
    """Begun anew, it runs what it ran; also while the broker is away."""
    told.is_away = True
    fetcher.look(waiting(image_digest=TWO).container_id)
    assert registry.begun()[0] == TWO


def test_a_pull_that_nobody_waits_for_is_ended(fetcher, here, registry, told, waiting):
    known = waiting()
    fetcher.look(known.container_id)
    _, stop = registry.begun()
    known.set_facts(wanted="cancelled")
    hand_over(here, known.container_id)
    assert stop.wait(SOON_S)
    assert told.is_silent()


def test_one_that_is_removed_is_dropped_and_the_others_wait_on(fetcher, registry, told, waiting):
    """Also where the word of its end was lost."""
    gone, stays = waiting(), waiting()
    for one in (gone, stays):
        fetcher.look(one.container_id)
    _, stop = registry.begun()
    gone.set_facts(wanted="cancelled")
    fetcher.look_again()
    assert not stop.is_set()
    registry.go.set()
    assert told.next()[0] == stays.container_id
    assert told.is_silent()


def test_no_more_are_pulled_at_a_time_than_the_settings_say(fetcher, registry, told, waiting):
    images = [f"docker.io/library/busybox:{number}" for number in range(3)]
    registry.digests |= {image: "sha256:" + str(number) * 64 for number, image in enumerate(images)}
    for image in images:
        fetcher.look(waiting(image).container_id)
    registry.begun(), registry.begun()
    with pytest.raises(queue.Empty):
        registry.pulls.get(timeout=QUIET_S)
    registry.go.set()
    assert {told.next()[2] for _ in images} == {"fetched"}


@pytest.mark.parametrize("error", [ImageError("image x", "manifest unknown"), ValueError("a defect")])
def test_whatever_fails_is_told_in_words(fetcher, registry, told, waiting, error):
    known = waiting()
    registry.error = error
    registry.go.set()
    fetcher.look(known.container_id)
    container_id, attempt, outcome, detail, _ = told.next()
    assert (container_id, attempt, outcome) == (known.container_id, 1, "failed")
    assert str(error) in detail


def test_what_was_told_is_not_fetched_again_by_a_second_look(fetcher, registry, told, waiting):
    """The message is on its way; one that could not be sent is sent at the next look."""
    known = waiting()
    registry.go.set()
    fetcher.look(known.container_id)
    assert told.next()[2] == "fetched"
    fetcher.look(known.container_id)
    assert told.is_silent()
    known.mark_undo_begun("image")  # it went before it was used: that is another wait
    known.mark_undone("image")
    known.mark_begun("image", {})
    fetcher.look(known.container_id)
    assert told.next()[2] == "fetched"


def test_an_outcome_that_cannot_be_told_is_told_at_the_next_look(fetcher, registry, told, waiting):
    known = waiting(image_digest=ONE)
    told.is_away = True
    registry.go.set()
    deadline = time.monotonic() + SOON_S
    while not registry.ended:
        fetcher.look(known.container_id)
        assert time.monotonic() < deadline
    told.is_away = False
    while told.heard.empty():
        fetcher.look(known.container_id)
        assert time.monotonic() < deadline
    assert told.next()[2] == "fetched"


def test_without_a_broker_nothing_is_pinned_and_a_later_look_begins_anew(fetcher, registry, told, waiting):
    known = waiting()
    told.is_away = True
    fetcher.look(known.container_id)
    assert told.is_silent()
    told.is_away = False
    registry.go.set()
    deadline = time.monotonic() + SOON_S
    while told.heard.empty():  # the errand of the first look may be on its way out
        fetcher.look(known.container_id)
        assert time.monotonic() < deadline
    assert told.next()[2:] == ("fetched", "", ONE)


def test_a_new_attempt_is_told_with_its_number(fetcher, registry, told, waiting):
    known = waiting()
    fetcher.look(known.container_id)
    registry.begun()
    known.new_attempt(2)
    fetcher.look(known.container_id)
    registry.go.set()
    assert told.next()[:2] == (known.container_id, 2)
    assert told.is_silent()


def test_stop_ends_pulls_and_tells_nobody(here, registry, told, waiting):
    """The journals stay as they are: the next worker's fetcher goes on."""
    made = Fetcher(here, told)
    made.start()
    made.look(waiting().container_id)
    registry.begun()
    made.stop()
    assert registry.ended == ["stopped"]
    assert told.is_silent()
    assert not module.socket_path(here).exists()


def test_an_order_is_carried_out_beside_sandboxes_of_the_same_image(fetcher, here, registry, told, waiting):
    told.orders[ORDER] = Order(BUSYBOX, "always")
    hand_over(here, ORDER)
    registry.begun()
    known = waiting(image_digest=ONE)
    fetcher.look(known.container_id)
    fetcher.look(ORDER)
    while not (rows := told.shown.get(timeout=SOON_S)) or rows[0]["waiters"] != 1:
        pass
    registry.go.set()
    heard = {told.next(), told.next()}
    assert heard == {(ORDER, "fetched", "", ONE), (known.container_id, 1, "fetched", "", ONE)}
    assert registry.ended == ["through"]
    fetcher.look(ORDER)
    assert told.is_silent()


def test_an_order_of_no_image_fails_and_one_that_is_over_does_nothing(fetcher, told):
    told.orders[ORDER] = Order("no image", "always")
    fetcher.look(ORDER)
    name, outcome, detail, _ = told.next()
    assert (name, outcome) == (ORDER, "failed")
    assert "no image" in detail
    fetcher.look("pull-00000000000000bb")
    assert told.is_silent()


def test_what_is_pulled_is_shown_and_then_no_more(fetcher, registry, told, waiting):
    assert told.shown.get(timeout=SOON_S) == []  # of the worker before nothing stays
    known = waiting()
    fetcher.look(known.container_id)
    while not (rows := told.shown.get(timeout=SOON_S)) or rows[0]["phase"] != "pulling":
        pass
    (row,) = rows
    assert (row["reference"], row["digest"], row["waiters"], row["batches"]) == (BUSYBOX, ONE, 1, ["b-1"])
    assert (row["done_bytes"], row["total_bytes"], row["orders"]) == (5, 10, [])
    registry.go.set()
    while told.shown.get(timeout=SOON_S):
        pass
