"""What a stage, a wait and a sandbox came to, as the worker's main process hears it from its children."""

import os
import queue
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from worker import journal as journals
from worker import outcomes
from worker.journal import Journal
from worker.spec import make_spec

ID = "sb-0123456789abcdef"
SPEC = make_spec(args=["true"])


class Heard:
    """Notes what it is told; times are left out."""

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[str, ...]] = queue.Queue()

    def stage(self, *values: Any) -> None:
        assert values[-1] >= 0
        self.told.put(values[:-1])

    def launched(self, duration_s: float) -> None:
        assert 0 <= duration_s < 60
        self.told.put(("launched",))

    def ended(self, state: str, reason: str) -> None:
        self.told.put((state, reason))

    def next(self) -> tuple[str, ...]:
        return self.told.get(timeout=10)


@pytest.fixture
def heard(monkeypatch) -> Iterator[Heard]:
    monkeypatch.setattr(journals, "listener", None)
    monkeypatch.setattr(outcomes, "_pipe", None)
    heard = Heard()
    outcomes.listen(heard)
    yield heard
    assert outcomes._pipe is not None
    os.close(outcomes._pipe.writer)  # which ends the thread that reads


@pytest.fixture
def known(tmp_path) -> Journal:
    return journals.create(tmp_path, ID, attempt=1, batch="b-1", spec=SPEC)


def test_a_stage_and_its_undo_are_told_when_they_end(heard, known):
    known.mark_begun("network")
    known.mark_done("network", {})
    known.mark_undo_begun("network")
    known.mark_undo_failed("network", "busy")
    known.mark_undo_begun("network")
    known.mark_undone("network")
    told = [heard.next() for _ in range(3)]
    assert told == [
        ("network", "do", "done"),
        ("network", "undo", "failed"),
        ("network", "undo", "done"),
    ]


def test_a_process_of_the_pool_is_heard_and_its_death_loses_no_count(heard, known):
    """A count in the process itself would be gone with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's words about a fork beside threads: the child only writes
        child = os.fork()
    if child == 0:
        try:
            known.mark_begun("netns")
            known.mark_failed("netns", "no room")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert heard.next() == ("netns", "do", "failed")


def test_a_stage_whose_process_was_lost_is_told_once_when_its_undo_begins(heard, known):
    """Nobody can write how it ended; so its journal has a stage without an end."""
    known.mark_begun("container")
    for _ in range(2):
        known.mark_undo_begun("container")
        known.mark_undo_failed("container", "busy")
    told = [heard.next() for _ in range(3)]
    assert told == [
        ("container", "do", "lost"),
        ("container", "undo", "failed"),
        ("container", "undo", "failed"),
    ]


def test_a_wait_that_somebody_ends_is_not_lost(heard, known):
    """`rm` of what has not answered yet, or waits for its image, is no fault of the host."""
    known.mark_begun("ready")
    known.mark_undo_begun("ready")
    assert heard.next() == ("ready", "do", "cut")
    known.mark_begun("image")
    known.set_facts(pulling=True)
    known.mark_undo_begun("image")
    assert heard.next() == ("image", "do", "cut")


def test_a_launch_is_told_once_it_is_ready_and_a_restart_is_none(heard, known):
    known.mark_begun("ready")
    known.mark_done("ready", {})
    assert [heard.next(), heard.next()] == [("ready", "do", "done"), ("launched",)]
    known.set_facts(restarts=1)
    known.mark_begun("ready")
    known.mark_done("ready", {})
    known.set_facts(wanted="exited", reason="exit")
    known.set_facts(final="exited")
    assert [heard.next(), heard.next()] == [("ready", "do", "done"), ("exited", "exit")]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"error": {"stage": "network", "message": "no"}}, "stage"),
        ({"error": {"stage": "container", "message": "no"}, "reason": "oom"}, "oom"),
        ({"reason": "cancel"}, "cancel"),
        ({"reason": "x" * 9000}, "other"),
        ({}, "other"),
    ],
)
def test_an_end_is_told_with_a_reason_of_ours(heard, known, facts, reason):
    """What a message names as its reason must not make a label of its own."""
    known.set_facts(wanted="failed", **facts)
    known.set_facts(final="failed")
    assert heard.next() == ("failed", reason)


def test_nobody_waits_for_a_reader_that_is_away(monkeypatch, known, caplog):
    """A stage goes on; the log says that the count is short of it."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    monkeypatch.setattr(outcomes, "_pipe", outcomes._Pipe(reader, writer))
    with suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    outcomes.tell_place("done", 0.1)
    assert "the metrics miss an outcome" in caplog.text
    os.close(reader)
    os.close(writer)


def test_without_metrics_nothing_is_told(known, monkeypatch):
    monkeypatch.setattr(outcomes, "_pipe", None)
    monkeypatch.setattr(journals, "listener", None)  # another test of this process may have made numbers
    outcomes.tell_place("done", 0.1)
    outcomes.tell_end("failed", "refused")
    assert journals.listener is None
