"""Where a sandbox's log is: beside its journal, then kept for as long as was asked for, then gone."""

import os
import time

import pytest

from worker import audit, journal, logs, mend
from worker.settings import Settings
from worker.spec import make_spec

ID, OTHER = "sb-0123456789abcdef", "sb-00000000000000aa"


@pytest.fixture
def settings(tmp_path):
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def make(settings):
    def make(container_id=ID, text="a\n", **fields):
        spec = make_spec(args=["true"], **fields)
        known = journal.create(settings.sandboxes_dir, container_id, attempt=1, batch="b", spec=spec)
        known.log_path.write_text(text)
        return known

    return make


def kept(settings, container_id=ID, *, for_s=100, text="x"):
    settings.logs_dir.mkdir(parents=True, exist_ok=True)
    path = settings.logs_dir / f"{container_id}.{int(time.time() + for_s)}.log"
    path.write_text(text)
    return path


def test_a_live_sandbox_has_its_log_beside_its_journal(settings, make):
    known = make()
    assert logs.find(settings, ID) == known.log_path


def test_the_log_of_an_ended_sandbox_is_found_after_its_journal_is_gone(settings, make):
    """The journal must go, as nothing is left behind; its log is what people look for then."""
    known = make(text="last words\n")
    logs.keep(settings, known)
    known.remove()
    assert not known.folder.exists()
    assert logs.find(settings, ID).read_text() == "last words\n"
    assert logs.find(settings, OTHER) is None


def test_keep_may_be_repeated(settings, make):
    """A worker killed between this and the removal of the journal does it again."""
    known = make()
    first = logs.keep(settings, known)
    assert logs.keep(settings, known) is None
    assert logs.find(settings, ID) == first


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [({}, 3600), ({"keep_s": 60.0}, 60), ({"remove": True, "keep_s": 900.0}, logs.FAREWELL_S)],
)
def test_a_log_is_kept_as_long_as_the_spec_says_or_the_host(settings, make, fields, seconds):
    logs.keep(settings, make(**fields))
    (one,) = logs.kept_logs(settings)
    assert seconds <= one.until - time.time() <= seconds + 2


def test_keep_0_keeps_nothing(settings, make):
    known = make(keep_s=0.0)
    assert logs.keep(settings, known) is None
    known.remove()
    assert logs.find(settings, ID) is None


def test_drop_removes_the_kept_log_of_this_sandbox_alone(settings):
    kept(settings)
    other = kept(settings, OTHER)
    logs.drop(settings, ID)
    logs.drop(settings, ID)
    assert [one.path for one in logs.kept_logs(settings)] == [other]


def test_prune_removes_what_is_due(settings):
    old, new = kept(settings, for_s=-5), kept(settings, OTHER)
    assert logs.prune(settings, time.time()) == [old]
    assert os.listdir(settings.logs_dir) == [new.name]
    assert logs.prune(settings, time.time()) == []


def test_prune_keeps_the_newest_that_fit(settings):
    """Many sandboxes an hour, each with a full log, must not fill the disk."""
    settings = settings.model_copy(update={"logs_max_bytes": 10})
    old, new = kept(settings, for_s=50, text="12345678"), kept(settings, OTHER, for_s=80, text="12345678")
    assert logs.prune(settings, time.time()) == [old]
    assert new.exists()


def test_a_log_whose_time_is_long_up_is_a_finding_and_mend_removes_it(settings, monkeypatch):
    """Where no worker looks any more, the audit says what stays."""
    for name in ("_network_objects", "_processes", "_mounts_and_cgroups"):
        monkeypatch.setattr(audit, name, lambda *_: None)
    monkeypatch.setattr(audit, "_netns", dict)
    late = kept(settings, for_s=-audit.LOG_LATE_S - 5)
    kept(settings, OTHER, for_s=-5)
    kept(settings, OTHER, for_s=50)
    found = audit.audit(settings)
    assert [(one.kind, one.name, one.problem) for one in found] == [("log", str(late), "extra")]
    outcomes = mend.mend(settings)
    assert [(one.finding.name, one.mended) for one in outcomes] == [(str(late), True)]
    assert not late.exists()
