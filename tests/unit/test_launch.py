"""The stage runner, on a table of stages that record what is done to them."""

import json
from typing import Any

import pytest

from worker import journal as journals
from worker import launch
from worker.errors import BadNetwork, ImageError, NotReady, RunscError, SandbatchError
from worker.image_store import ImageStore
from worker.journal import FILE, Journal
from worker.spec import make_spec
from worker.stages import STAGES, Stage

ID = "sb-0123456789abcdef"
HOST: Any = object()  # the stages alone know what it is
NAMES = ["netns", "network", "bundle"]


class Table:
    """Stages that note `do NAME` and `undo NAME`, and fail where they are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.stages = tuple(self._stage(name) for name in NAMES)

    def _stage(self, name: str) -> Stage:
        def intend(host: Any, journal: Journal) -> dict[str, Any]:
            self._call(f"intend {name}")
            return {"of": name}

        def do(host: Any, journal: Journal) -> dict[str, Any]:
            assert journals.read(journal.folder).begun[-1] == name, "the intent is not on disk"
            self._call(f"do {name}")
            return {"made": name}

        def undo(host: Any, journal: Journal) -> None:
            self._call(f"undo {name}")

        return Stage(name, do=do, undo=undo, intend=intend)

    def _call(self, what: str) -> None:
        if not what.startswith("intend"):
            self.calls.append(what)
        if what in self.fails:
            raise self.fails[what]

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def table(monkeypatch) -> Table:
    table = Table()
    monkeypatch.setattr(launch, "STAGES", table.stages)
    monkeypatch.setattr(launch, "STAGE", {stage.name: stage for stage in table.stages})
    return table


@pytest.fixture
def known(tmp_path) -> Journal:
    return journals.create(tmp_path, ID, attempt=1, batch="b", spec=make_spec(args=["true"]))


def events(known: Journal) -> list[str]:
    lines = (known.folder / FILE).read_text().splitlines()[1:]
    return [" ".join(filter(None, (one["event"], one.get("stage")))) for one in map(json.loads, lines)]


def run_all(known: Journal) -> None:
    for name in NAMES:
        assert launch.run_stage(HOST, known, name)


def test_the_intent_is_noted_before_the_act_and_what_came_of_it_after(table, known):
    """A failed ADD may already hold an address: whoever reads the journal must know that it began."""
    assert launch.run_stage(HOST, known, "netns") is True
    assert events(known) == ["begun netns", "done netns"]
    assert known.intents == {"netns": {"of": "netns"}}
    assert known.data == {"netns": {"made": "netns"}}


def test_a_second_copy_of_a_message_does_nothing(table, known):
    launch.run_stage(HOST, known, "netns")
    table.take()
    assert launch.run_stage(HOST, journals.read(known.folder), "netns") is False
    assert table.take() == []


def test_undo_goes_from_the_last_stage_to_the_first(table, known):
    run_all(known)
    table.take()
    launch.undo_all(HOST, known)
    assert table.take() == ["undo bundle", "undo network", "undo netns"]
    assert (known.begun, known.final) == ([], "failed")


def test_undo_acts_only_on_what_was_begun_half_done_stages_too(table, known):
    launch.run_stage(HOST, known, "netns")
    known.mark_begun("network")  # and then its process was killed
    table.take()
    launch.undo_all(HOST, journals.read(known.folder))
    assert table.take() == ["undo network", "undo netns"]


def test_undo_stops_at_the_first_that_fails_and_goes_on_from_there(table, known):
    """A DEL that is tried again needs its netns."""
    run_all(known)
    table.take()
    table.fails["undo network"] = RunscError("network", "busy")
    with pytest.raises(RunscError, match="busy"):
        launch.undo_all(HOST, known)
    assert table.take() == ["undo bundle", "undo network"]
    assert (known.begun, known.final) == (["netns", "network"], None)
    assert (known.runs[-1].state, known.runs[-1].error) == ("failed", "network: busy")

    del table.fails["undo network"]
    launch.undo_all(HOST, journals.read(known.folder))
    assert table.take() == ["undo network", "undo netns"]


def test_undo_is_safe_to_repeat(table, known):
    run_all(known)
    launch.undo_all(HOST, known)
    table.take()
    launch.undo_all(HOST, journals.read(known.folder))
    assert table.take() == []
    assert events(known).count("facts") == 1  # its end is noted once


@pytest.mark.parametrize(
    "error", [RunscError("x", "broken"), OSError(28, "No space left"), KeyboardInterrupt(), SystemExit()]
)
def test_however_a_stage_fails_the_journal_says_so_and_its_undo_is_due(table, known, error):
    """Celery's time limits are no Exceptions to count on: what was begun may hold something."""
    table.fails["do network"] = error
    launch.run_stage(HOST, known, "netns")
    with pytest.raises(type(error)):
        launch.run_stage(HOST, known, "network")
    other = journals.read(known.folder)
    assert other.begun == ["netns", "network"]
    assert other.runs[-1].state == "failed"
    assert other.runs[-1].error == (str(error) or type(error).__name__)
    table.take()
    launch.undo_all(HOST, other)
    assert table.take() == ["undo network", "undo netns"]


def test_a_stage_that_failed_is_undone_before_it_is_tried_again(table, known):
    """Half of it may be there: a plugin that was killed has its lease."""
    table.fails["do network"] = RunscError("network", "later")
    launch.run_stage(HOST, known, "netns")
    with pytest.raises(RunscError):
        launch.run_stage(HOST, known, "network")
    table.fails.clear()
    table.take()
    assert launch.run_stage(HOST, journals.read(known.folder), "network") is True
    assert table.take() == ["undo network", "do network"]


def test_a_stage_whose_undo_fails_is_not_done_on_top_of_its_rest(table, known):
    known.mark_begun("network")
    table.fails["undo network"] = RunscError("network", "busy")
    with pytest.raises(RunscError, match="busy"):
        launch.run_stage(HOST, known, "network")
    assert table.take() == ["undo network"]
    assert known.begun == ["network"]


def test_a_new_attempt_first_undoes_what_the_old_one_left(table, known):
    """A sandbox that ran has taken the addresses off its netns: nothing of it can be used again."""
    launch.run_stage(HOST, known, "netns")
    launch.run_stage(HOST, known, "network")
    known.mark_begun("bundle")
    known.new_attempt(2)
    table.take()
    assert launch.run_stage(HOST, journals.read(known.folder), "netns") is True
    assert table.take() == ["undo bundle", "undo network", "undo netns", "do netns"]


def test_the_leftovers_of_an_attempt_are_undone_once(table, known):
    launch.run_stage(HOST, known, "netns")
    known.new_attempt(2)
    table.take()
    for name in NAMES:
        launch.run_stage(HOST, journals.read(known.folder), name)
    assert table.take() == ["undo netns", "do netns", "do network", "do bundle"]


def test_an_undo_of_leftovers_that_fails_leaves_them_due(table, known):
    """And the next try of the stage goes on with them."""
    launch.run_stage(HOST, known, "netns")
    launch.run_stage(HOST, known, "network")
    known.new_attempt(2)
    table.fails["undo network"] = RunscError("network", "busy")
    table.take()
    with pytest.raises(RunscError):
        launch.run_stage(HOST, known, "netns")
    assert table.take() == ["undo network"]
    table.fails.clear()
    launch.run_stage(HOST, journals.read(known.folder), "netns")
    assert table.take() == ["undo network", "undo netns", "do netns"]


def test_a_sandbox_that_is_to_end_begins_nothing(table, known):
    """Its `rm` may come between two stages."""
    launch.run_stage(HOST, known, "netns")
    launch.want_end(known, "exited")
    table.take()
    assert launch.run_stage(HOST, journals.read(known.folder), "network") is False
    assert table.take() == []


def test_a_sandbox_that_is_to_end_is_not_undone_by_its_stages(table, known):
    """The undos are messages of their own; a stage's would hold what they wait for."""
    launch.run_stage(HOST, known, "netns")
    known.new_attempt(2)
    launch.want_end(known, "exited")
    table.take()
    assert launch.run_stage(HOST, known, "netns") is False
    assert table.take() == []


def test_a_refusal_before_the_act_is_a_failure_of_the_stage(table, known):
    """A network that nobody has: `show` says so at the stage, and its undo knows that nothing ran."""
    table.fails["intend network"] = BadNetwork("network x", "there is none")
    with pytest.raises(BadNetwork):
        launch.run_stage(HOST, known, "network")
    assert table.take() == []
    assert events(known) == ["begun network", "failed network"]
    assert known.intents["network"] == {}
    assert known.runs[-1].error == "network x: there is none"


def test_the_first_reason_to_end_is_kept(known):
    """A failure while an `rm` is under way does not make it failed, nor the other way round."""
    launch.want_end(known, "failed", {"stage": "network", "message": "no"})
    launch.want_end(known, "exited")
    launch.finish(known)
    assert known.final == "failed"
    assert known.facts["error"] == {"stage": "network", "message": "no"}


def test_nothing_ends_while_something_is_begun(known):
    """A terminal state means that the audit finds nothing."""
    known.mark_begun("netns")
    launch.want_end(known, "exited")
    with pytest.raises(SandbatchError, match="still holds netns"):
        launch.finish(known)
    assert journals.read(known.folder).final is None


def test_the_end_takes_back_that_it_was_stuck(known):
    known.set_facts(wanted="exited", stuck={"stage": "network", "message": "busy"})
    launch.finish(known)
    other = journals.read(known.folder)
    assert (other.final, other.facts["stuck"]) == ("exited", None)


def test_a_sandbox_runs_once_its_probe_is_answered(known):
    launch.begin_waiting(known)
    launch.begin_waiting(journals.read(known.folder))
    assert events(known) == ["begun ready"]
    assert launch.end_waiting(known, "answered", "HTTP 200") is True
    assert known.data["ready"] == {"probe": "HTTP 200"}
    assert launch.end_waiting(journals.read(known.folder), "answered", "HTTP 200") is False


@pytest.mark.parametrize("outcome", ["deadline", "ended"])
def test_a_probe_without_an_answer_fails_the_stage(known, outcome):
    launch.begin_waiting(known)
    with pytest.raises(NotReady, match="no answer to tcp:80"):
        launch.end_waiting(known, outcome, "no answer to tcp:80")
    assert (known.runs[-1].state, known.runs[-1].error) == ("failed", "no answer to tcp:80")
    assert not known.is_done("ready")


def test_an_answer_that_comes_after_the_rm_changes_nothing(known):
    launch.begin_waiting(known)
    launch.want_end(known, "exited")
    assert launch.end_waiting(known, "answered", "HTTP 200") is False
    assert not known.is_done("ready")


def test_the_real_table_is_what_runs():
    """Each stage once, by its name, first to last."""
    assert launch.STAGES is STAGES
    assert {name: stage for name, stage in launch.STAGE.items() if stage.name == name} == launch.STAGE
    assert tuple(launch.STAGE.values()) == STAGES


# -- images --------------------------------------------------------------------------------------

BUSYBOX = "docker.io/library/busybox:latest"
DIGEST = "sha256:" + "1" * 64


class ImageTable(Table):
    """With stage `image`, whose image may be gone."""

    is_here = True

    def _stage(self, name: str) -> Stage:
        made = super()._stage(name)
        if name != "image":
            return made

        def do(host: Any, journal: Journal) -> dict[str, Any]:
            if not self.is_here:
                raise ImageError("image", "is not on this host", can_pass=True)
            return {**made.do(host, journal), "spec": {}}

        def intend(host: Any, journal: Journal) -> dict[str, Any]:
            return {"digest": journal.facts["image_digest"]}

        return Stage(name, do=do, undo=made.undo, intend=intend)


@pytest.fixture
def images(monkeypatch) -> ImageTable:
    monkeypatch.setattr(launch, "STAGES", ())
    table = ImageTable()
    table.stages = tuple(table._stage(name) for name in ("image", *NAMES))
    monkeypatch.setattr(launch, "STAGES", table.stages)
    monkeypatch.setattr(launch, "STAGE", {stage.name: stage for stage in table.stages})
    return table


@pytest.fixture
def of_image(tmp_path) -> Journal:
    spec = make_spec(args=["true"], image=BUSYBOX)
    return journals.create(tmp_path, ID, attempt=1, batch="b", spec=spec)


def test_an_image_that_is_here_is_used_at_once(images, of_image):
    launch.use_image(HOST, of_image, DIGEST)
    assert events(of_image) == ["facts", "begun image", "done image"]
    assert of_image.intents["image"] == {"digest": DIGEST}
    assert not of_image.waits_for_image


def test_an_image_that_is_pulled_is_one_stage_from_the_pull_s_begin_to_its_use(images, of_image):
    """`show` has one line for it, with the time that it took."""
    launch.begin_pull(HOST, of_image, None)
    assert of_image.waits_for_image
    assert launch.end_pull(of_image, "fetched", "", DIGEST) is True
    assert launch.end_pull(of_image, "fetched", "", DIGEST) is True  # a twin
    assert of_image.waits_for_image  # for a slot
    assert of_image.facts["image_digest"] == DIGEST
    launch.use_image(HOST, of_image, DIGEST)
    assert not of_image.waits_for_image
    assert events(of_image) == ["begun image", "facts", "facts", "facts", "done image"]
    assert [(run.name, run.verb, run.state) for run in of_image.runs] == [("image", "do", "done")]
    assert images.take() == ["do image"]
    assert launch.end_pull(of_image, "fetched", "", DIGEST) is False


def test_an_image_that_cannot_be_had_fails_the_stage_in_its_words(images, of_image):
    launch.begin_pull(HOST, of_image, None)
    with pytest.raises(ImageError, match="manifest unknown"):
        launch.end_pull(of_image, "failed", "image x: manifest unknown", "")
    assert of_image.runs[-1].error == "image x: manifest unknown"
    assert not of_image.waits_for_image
    assert of_image.begun == ["image"]


def test_a_new_attempt_waits_again_and_keeps_its_digest(images, of_image):
    """The worker died over the pull, or the sandbox is started anew: what it holds is undone first."""
    launch.use_image(HOST, of_image, DIGEST)
    launch.run_stage(HOST, of_image, "netns")
    of_image.new_attempt(2)
    images.take()
    launch.begin_pull(HOST, of_image, of_image.facts["image_digest"])
    assert images.take() == ["undo netns", "undo image"]
    assert of_image.waits_for_image
    of_image.new_attempt(3)
    assert launch.end_pull(of_image, "fetched", "", DIGEST) is True
    launch.use_image(HOST, of_image, DIGEST)
    assert images.take() == ["undo image", "do image"]
    assert of_image.is_done("image")
    assert not of_image.is_stale


def test_an_image_that_goes_before_it_is_used_is_fetched_again_but_not_for_ever(images, of_image):
    images.is_here = False
    launch.begin_pull(HOST, of_image, DIGEST)
    for _ in range(launch.MOST_GONE - 1):
        assert launch.end_pull(of_image, "fetched", "", DIGEST)
        with pytest.raises(ImageError):
            launch.use_image(HOST, of_image, DIGEST)
        assert not of_image.waits_for_image
        launch.begin_pull(HOST, of_image, DIGEST, is_gone=True)
        assert of_image.waits_for_image
    with pytest.raises(ImageError, match="removed 3 times"):
        launch.begin_pull(HOST, of_image, DIGEST, is_gone=True)


def test_an_image_that_may_not_be_pulled_fails_the_stage(images, of_image):
    launch.refuse_image(HOST, of_image, ImageError("image x", "is not on this host"))
    assert of_image.begun == ["image"]
    assert of_image.runs[-1].error == "image x: is not on this host"


def test_an_image_that_was_pulled_is_in_use_before_its_sandbox_has_a_slot(images, settings):
    """Nobody may remove it while fifty wait for it."""
    spec = make_spec(args=["true"], image=BUSYBOX)
    known = journals.create(settings.sandboxes_dir, ID, attempt=1, batch="b", spec=spec)
    launch.begin_pull(HOST, known, None)
    assert ImageStore(settings).users() == {}
    launch.end_pull(known, "fetched", "", DIGEST)
    assert ImageStore(settings).users() == {DIGEST: [ID]}
    launch.undo_stage(HOST, known, launch.STAGE["image"])
    assert ImageStore(settings).users() == {}
