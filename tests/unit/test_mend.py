"""What mend may touch, and when: the parts of it that need no root."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker import journal, leftovers, mend
from worker.audit import Finding
from worker.errors import Busy
from worker.journal import FILE, Journal
from worker.settings import Settings
from worker.spec import make_spec

ID, OTHER = "sb-" + "a" * 16, "sb-" + "b" * 16
SPEC = make_spec(args=["true"])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch) -> Settings:
    """A host without a firewall."""
    monkeypatch.setattr(leftovers, "remove_chains", lambda *_: None)
    return Settings(
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        cni_conf_dir=tmp_path / "net.d",
        cni_cache_dir=tmp_path / "cni",
    )


def begin(settings: Settings) -> Journal:
    return journal.create(settings.sandboxes_dir, ID, attempt=1, batch="b", spec=SPEC)


def test_a_sandbox_with_a_journal_is_not_mended(settings):
    """It may have been placed here after the audit looked."""
    known = begin(settings)
    before = (known.folder / FILE).read_bytes()
    assert mend._Work(settings).mend_one(ID) == mend.HAS_JOURNAL
    assert (known.folder / FILE).read_bytes() == before


def test_what_appeared_after_a_sandbox_ended_is_mended_and_its_journal_kept(settings):
    """The record is not told of its end yet: that is the worker's."""
    known = begin(settings)
    known.set_facts(wanted="exited", final="exited")
    settings.exit_dir.mkdir(parents=True)
    (settings.exit_dir / ID).write_text("0")
    assert mend._Work(settings).mend_one(ID) == ""
    assert os.listdir(settings.exit_dir) == []
    assert journal.read(known.folder).final == "exited"


def test_a_launch_of_the_same_id_waits_until_it_is_mended_and_then_begins(settings, monkeypatch):
    """Else the undo of the old one would take what the new one has just made."""
    undo, seen = mend._Work._undo, []
    with ThreadPoolExecutor() as pool:

        def undo_slowly(work: mend._Work, container_id: str, folder: Path) -> None:
            placing = pool.submit(begin, settings)
            with pytest.raises(TimeoutError):
                placing.result(timeout=0.2)
            undo(work, container_id, folder)
            seen.append(placing)

        monkeypatch.setattr(mend._Work, "_undo", undo_slowly)
        assert mend._Work(settings).mend_one(ID) == ""
        assert seen[0].result(timeout=10).attempt == 1
    assert mend._Work(settings).mend_one(ID) == mend.HAS_JOURNAL


def test_an_id_that_somebody_works_on_is_left(settings):
    (settings.sandboxes_dir / ID).mkdir(parents=True)
    with journal.held(settings.sandboxes_dir, ID):
        assert "somebody works on it" in mend._Work(settings).mend_one(ID)
    assert mend._Work(settings).mend_one(ID) == ""
    assert os.listdir(settings.sandboxes_dir) == []


def test_an_undo_that_fails_leaves_no_new_folder_behind(settings, monkeypatch):
    """The folder that was made for the lock would be one more finding."""
    (settings.run_dir / "exits" / ID).mkdir(parents=True)  # no file: it cannot be unlinked
    assert "Is a directory" in mend._Work(settings).mend_one(ID)
    assert os.listdir(settings.sandboxes_dir) == []


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/etc")])
def test_what_has_a_sandboxs_name_and_is_no_folder_is_left(settings, make):
    settings.sandboxes_dir.mkdir(parents=True)
    make(settings.sandboxes_dir / ID)
    assert mend._Work(settings).mend_one(ID) != ""
    assert os.listdir(settings.sandboxes_dir) == [ID]


def test_a_bundle_that_is_a_link_is_not_followed(settings, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").touch()
    (settings.sandboxes_dir / ID).mkdir(parents=True)
    (settings.sandboxes_dir / ID / "bundle").symlink_to(tmp_path / "precious")
    assert mend._Work(settings).mend_one(ID) == ""
    assert os.listdir(tmp_path / "precious") == ["config.json"]


def test_the_journal_that_cannot_be_read_is_kept_for_the_operator(settings):
    known = begin(settings)
    (known.folder / FILE).write_text("hello\n")
    assert mend._Work(settings).mend_one(ID) == ""
    (kept,) = (settings.state_dir / "set-aside").iterdir()
    assert kept.name.startswith(f"{ID}.{FILE}.foreign-")
    assert kept.read_text() == "hello\n"
    assert os.listdir(settings.sandboxes_dir) == []


def test_leases_are_freed_under_the_lock_of_the_ipam_plugin(tmp_path, monkeypatch):
    """host-local may be about to lend the same address again."""
    monkeypatch.setattr(leftovers, "LOCK_WAIT_S", 0.1)
    names = {"10.0.0.2": ID, "10.0.0.3": OTHER, "10.0.0.4": f"{ID}0", "last_reserved_ip.0": "10.0.0.4"}
    for name, owner in names.items():
        (tmp_path / name).write_text(f"{owner}\r\neth0")
    (tmp_path / "10.0.0.5").symlink_to("10.0.0.2")
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="an IPAM plugin holds their lock"):
            leftovers.free_leases(ID, [tmp_path])
    leftovers.free_leases(ID, [tmp_path, tmp_path / "none"])
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "10.0.0.5", "lock"])[1:]


def test_the_owners_of_a_rule_are_those_of_its_comments():
    """An id in any other word of a rule is none."""
    rule = ["POSTROUTING", "-m", "comment", "--comment", f'name: "n" id: "{ID}"', "-j", f"CNI-{OTHER}"]
    assert leftovers._owners(rule) == [ID]
    assert leftovers._target(rule) == f"CNI-{OTHER}"
    assert leftovers._owners(["POSTROUTING", "-s", ID]) == []


def test_mended_is_what_the_second_look_does_not_find():
    """Not what we think that we have removed; a journal's name changes when it is set aside."""
    gone = Finding("netns", ID, "extra", ID, "no journal has it")
    torn = Finding("journal", f"/s/{ID}/{FILE}", "unreadable", ID, "torn")
    aside = Finding("journal", f"/s/{ID}/{FILE}.torn-20260101T000000", "unreadable", ID, "set aside: torn")
    new = Finding("lease", "/l/10.0.0.2", "missing", OTHER, "its journal says it is there")
    outcomes = mend._outcomes([gone, torn], [aside, new], {ID: "no such moon"})
    assert [(one.finding, one.mended, one.why) for one in outcomes] == [
        (gone, True, "no journal has it"),
        (aside, False, "no such moon"),
        (new, False, mend.MISSING),
    ]


def test_beside_a_worker_its_undos_are_its_own(settings):
    known = begin(settings)
    known.mark_begun("netns")
    known.set_facts(wanted="failed")
    settings.run_dir.mkdir()
    with (settings.run_dir / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert mend._finish_undos(settings) == {}
    assert journal.read(known.folder).begun == ["netns"]
