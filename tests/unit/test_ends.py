"""How a sandbox ends, decided from its journal and conmon's exit file."""

import time
from datetime import datetime
from typing import Any

import pytest

from worker import ends, limits
from worker import journal as journals
from worker.ends import Due
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import make_spec

CONTAINER_ID = "sb-0123456789abcdef"
LONG_AGO = "2020-01-01T00:00:00.000Z"


@pytest.fixture
def running(settings) -> Any:
    """A sandbox that runs, by its journal."""

    def make(*, is_ready: bool = True, **spec: Any) -> Journal:
        wanted = make_spec(args=["true"], **spec)
        known = journals.create(settings.sandboxes_dir, CONTAINER_ID, attempt=1, batch="b", spec=wanted)
        for stage in ("netns", "network", "bundle", "container"):
            known.mark_begun(stage)
            known.mark_done(stage, {"has_cgroup": True} if stage == "bundle" else {})
        known.mark_begun("ready")
        if is_ready:
            known.mark_done("ready", {})
            known.set_facts(running_at=journals.now())
        return known

    return make


def ended(settings: Settings, known: Journal, code: int | None) -> bool:
    if code is not None:
        (settings.exit_dir / known.container_id).write_text(str(code))
    return ends.note_end(settings, known, is_alive=False)


def epoch(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


@pytest.mark.parametrize("code", [0, 7, 137])
def test_who_ends_by_itself_is_exited_with_its_code(settings, running, code):
    known = running()
    assert ended(settings, known, code)
    facts = journals.read(known.folder).facts
    assert (facts["wanted"], facts["exit_code"], facts["reason"]) == ("exited", code, "exit")
    written_at = (settings.exit_dir / CONTAINER_ID).stat().st_mtime
    assert abs(epoch(facts["ended_at"]) - written_at) < 0.01


@pytest.mark.parametrize("code", [1, 137, None])
def test_who_was_killed_for_want_of_memory_failed_of_that(settings, running, monkeypatch, code):
    """The runsc of 2024 says 1 and the newer one 137; only the cgroup knows why."""
    monkeypatch.setattr(limits, "was_oom_killed", lambda cgroup: cgroup == f"/sandbatch/{CONTAINER_ID}")
    known = running(memory_bytes=64 * 2**20)
    assert ended(settings, known, code)
    assert (known.facts["wanted"], known.facts["reason"], known.facts["oom"]) == ("failed", "oom", True)
    assert known.facts["error"]["message"] == "oom: killed for want of memory; its limit is 64m"


def test_who_lost_a_process_to_it_and_went_on_is_exited(settings, running, monkeypatch):
    """With the runsc of 2024 the kernel may take one process of many; the fact is there all the same."""
    monkeypatch.setattr(limits, "was_oom_killed", lambda cgroup: True)
    known = running(memory_bytes=64 * 2**20)
    assert ended(settings, known, 0)
    assert (known.facts["wanted"], known.facts["reason"], known.facts["oom"]) == ("exited", "exit", True)


def test_who_dies_of_its_memory_may_be_started_anew(settings, running, monkeypatch):
    monkeypatch.setattr(limits, "was_oom_killed", lambda cgroup: True)
    known = running(restart="on-failure:1")
    assert ended(settings, known, 137)
    assert not known.is_unwinding
    assert known.facts["restart_at"]


def test_an_end_is_noted_once(settings, running):
    known = running()
    assert ended(settings, known, 7)
    seq = known.seq
    assert not ended(settings, known, 7)
    assert known.seq == seq


def test_one_that_lives_has_not_ended(settings, running):
    known = running()
    assert not ends.note_end(settings, known, is_alive=True)
    assert not known.is_unwinding


def test_one_that_was_faster_than_its_report_did_run(settings, running):
    """`sh -c 'exit 7'` ends before anybody has noted that it runs."""
    known = running(is_ready=False)
    assert ended(settings, known, 7)
    assert known.facts["wanted"] == "exited"
    assert known.is_done("ready")
    assert known.facts["running_at"]


def test_one_that_was_to_answer_and_ended_first_has_failed(settings, running):
    known = running(is_ready=False, ready="tcp:80")
    assert ended(settings, known, 0)
    assert known.facts["wanted"] == "failed"
    assert known.facts["error"] == {
        "stage": "ready",
        "message": "it ended with exit code 0 before it was ready; it wrote nothing",
    }


def test_a_port_that_the_image_exposes_says_whence_it_is_where_the_program_serves_nobody(settings, running):
    """Of `run --image WEB -- cat FILE` nobody asked for a probe: its error says how to have none."""
    known = running(is_ready=False, image="app", network="net")
    known.mark_begun("image")
    known.mark_done("image", {"digest": "sha256:0", "labels": {}, "spec": {"ready": "tcp:80"}})
    assert ended(settings, known, 0)
    words = "before it was ready (a port that the image exposes; --ready none asks for none)"
    assert words in known.facts["error"]["message"]


def test_one_without_an_exit_code_was_killed_from_outside(settings, running):
    known = running()
    assert ended(settings, known, None)
    assert (known.facts["wanted"], known.facts["reason"]) == ("failed", "lost")


@pytest.mark.parametrize(
    ("reason", "wanted"), [("stop", "exited"), ("ttl", "exited"), ("deadline", "failed")]
)
def test_one_that_was_to_stop_ends_as_it_was_to(settings, running, reason, wanted):
    """Whatever its policy: who is stopped is not started anew."""
    known = running(restart="on-failure", deadline_at=LONG_AGO)
    assert ends.ask_to_stop(known, reason, 10)
    assert ended(settings, known, 143)
    facts = known.facts
    assert (facts["wanted"], facts["reason"], facts["exit_code"]) == (wanted, reason, 143)
    assert ("error" in facts) is (reason == "deadline")


def test_a_failure_is_followed_by_another_start_with_growing_pauses(settings, running):
    known = running(restart="on-failure:3")
    pauses = []
    for _ in range(3):
        assert ended(settings, known, 1)
        assert not known.is_unwinding
        assert not known.is_up
        pauses.append(epoch(known.facts["restart_at"]) - time.time())
        known.set_facts(restart_at=None)  # as if it had been started
    assert pauses == pytest.approx([1, 2, 4], abs=0.5)
    assert ended(settings, known, 1)
    assert (known.facts["wanted"], known.facts["restarts"]) == ("exited", 3)


def test_a_long_run_makes_the_next_pause_short_again(settings, running, monkeypatch):
    known = running(restart="on-failure")
    known.set_facts(restarts=9, quick_ends=9)
    monkeypatch.setattr(ends, "LONG_RUN_S", 0.0)
    assert ended(settings, known, 1)
    assert epoch(known.facts["restart_at"]) - time.time() < 2


def test_a_success_is_followed_by_no_start(settings, running):
    known = running(restart="on-failure")
    assert ended(settings, known, 0)
    assert known.facts["wanted"] == "exited"


def test_a_second_wish_to_stop_can_only_make_it_sooner(running):
    known = running()
    assert ends.ask_to_stop(known, "stop", 30)
    assert not ends.ask_to_stop(known, "ttl", 60)
    assert ends.ask_to_stop(known, "ttl", 1)
    assert known.facts["stop"]["reason"] == "stop"
    assert known.facts["stop"]["grace_s"] == 1


# -- the clock -----------------------------------------------------------------------------------


def test_without_a_time_nothing_is_due(running):
    assert ends.next_due(running(), was_asked=False) is None


def test_the_ttl_counts_from_running(running):
    known = running(ttl_s=100)
    assert ends.next_due(known, was_asked=False) == Due(epoch(known.facts["running_at"]) + 100, "ttl")


def test_the_earlier_of_ttl_and_deadline_is_due(running):
    known = running(ttl_s=100, deadline_at=LONG_AGO)
    assert ends.next_due(known, was_asked=False) == Due(epoch(LONG_AGO), "deadline")


def test_term_comes_first_and_kill_after_the_grace(running):
    known = running(ttl_s=100, deadline_at=LONG_AGO)
    ends.ask_to_stop(known, "stop", 7)
    since = epoch(known.facts["stop"]["at"])
    assert ends.next_due(known, was_asked=False) == Due(since, "term")
    assert ends.next_due(known, was_asked=True) == Due(since + 7, "kill")


def test_between_two_runs_only_the_next_start_is_due(running, settings):
    known = running(restart="on-failure", ttl_s=0.001)
    ended(settings, known, 1)
    assert ends.next_due(known, was_asked=False) == Due(epoch(known.facts["restart_at"]), "restart")


def test_a_launch_has_only_its_deadline(running):
    known = running(is_ready=False, ttl_s=0.001, deadline_at=LONG_AGO)
    known.mark_undone("container")
    assert ends.next_due(known, was_asked=False) == Due(epoch(LONG_AGO), "deadline")


def test_one_whose_end_is_under_way_has_nothing_due(running):
    known = running(ttl_s=1)
    known.set_facts(wanted="exited")
    assert ends.next_due(known, was_asked=False) is None
