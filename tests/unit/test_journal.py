"""The host's own record: what it says after any crash, and who may write it."""

import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker import journal
from worker.errors import Busy, JournalError
from worker.journal import FILE, Journal
from worker.spec import make_spec

ID = "sb-0123456789abcdef"
SPEC = make_spec(args=["true"], labels={"team": "rot"})


@pytest.fixture
def sandboxes(tmp_path):
    return tmp_path / "sandboxes"


@pytest.fixture
def known(sandboxes) -> Journal:
    return journal.create(sandboxes, ID, attempt=1, batch="b-1", spec=SPEC)


def text(known: Journal) -> str:
    return (known.folder / FILE).read_text()


def again(known: Journal) -> Journal:
    """As another process reads it."""
    return journal.read(known.folder)


def test_a_new_journal_says_what_was_asked_for(known, sandboxes):
    assert (known.container_id, known.attempt, known.batch, known.spec) == (ID, 1, "b-1", SPEC)
    assert known.boot == journal.boot_id()
    assert (known.seq, known.begun, known.facts, known.final) == (0, [], {}, None)
    assert os.listdir(known.folder) == [FILE]
    assert known.folder.stat().st_mode & 0o777 == 0o700


def test_create_keeps_the_journal_that_is_there(known, sandboxes):
    """A second copy of `place` must not wipe what the first one's stages have noted."""
    known.mark_begun("netns")
    other = journal.create(sandboxes, ID, attempt=9, batch="other", spec=SPEC)
    assert (other.attempt, other.batch, other.begun) == (1, "b-1", ["netns"])


def test_another_process_reads_what_was_noted(known):
    """Stages are done by any pool process; the journal is all that they share."""
    known.mark_begun("netns")
    known.mark_done("netns", {"path": "/run/netns/x"})
    known.mark_begun("network", {"config": "{}"})
    known.mark_failed("network", "no\naddress")
    known.set_facts(wanted="failed", error={"stage": "network", "message": "no"})
    known.mark_undo_begun("network")
    known.mark_undo_failed("network", "busy")
    known.mark_undo_begun("network")
    known.mark_undone("network")

    other = again(known)
    assert other == known
    assert other.begun == ["netns"]
    assert other.is_done("netns")
    assert not other.is_done("network")
    assert other.data == {"netns": {"path": "/run/netns/x"}}
    assert other.is_unwinding
    assert [(run.name, run.verb, run.state, run.error) for run in other.runs] == [
        ("netns", "do", "done", None),
        ("network", "do", "failed", "no\naddress"),
        ("network", "undo", "failed", "busy"),
        ("network", "undo", "done", None),
    ]
    assert all(run.duration_s is not None and run.ended_at for run in other.runs)


def test_every_event_has_the_next_number(known):
    """The record takes a view only if its number is higher."""
    known.mark_begun("netns")
    again(known).mark_done("netns", {})
    other = again(known)
    other.set_facts(running_at=journal.now())
    assert [json.loads(line)["seq"] for line in text(known).splitlines()[1:]] == [1, 2, 3]
    assert again(known).seq == other.seq == 3


def test_an_intent_outlives_the_undo_of_its_stage(known):
    """A message of an undo that comes twice finds what the undo needs."""
    known.mark_begun("network", {"config": "one"})
    known.mark_undone("network")
    assert again(known).intents["network"] == {"config": "one"}
    known.mark_begun("network", {"config": "two"})
    assert again(known).intents["network"] == {"config": "two"}


def test_a_new_attempt_makes_stale_what_is_begun_until_it_is_undone(known):
    known.mark_begun("netns")
    known.mark_done("netns", {})
    known.mark_begun("network")
    known.new_attempt(2)
    assert (again(known).attempt, again(known).is_stale) == (2, True)
    known.mark_undone("network")
    assert again(known).is_stale
    known.mark_undone("netns")
    known.mark_begun("netns")
    assert not again(known).is_stale
    assert again(known).begun == ["netns"]


def test_a_new_attempt_that_holds_nothing_is_not_stale(known):
    known.new_attempt(2)
    assert not again(known).is_stale


def test_every_cut_of_the_last_line_is_as_if_it_had_not_been_written(known):
    """A kill or a power cut may leave any part of it."""
    known.mark_begun("netns")
    before = text(known)
    known.mark_done("netns", {"a": "ü"})
    last = (known.folder / FILE).read_bytes()[len(before.encode()) :]
    for length in range(len(last)):
        (known.folder / FILE).write_bytes(before.encode() + last[:length])
        assert (again(known).seq, again(known).is_done("netns")) == (1, False)


def test_what_comes_after_a_torn_line_is_not_glued_to_it(known, sandboxes):
    with (known.folder / FILE).open("a") as out:
        out.write('{"seq": 1, "event": "beg')
    with journal.locked(sandboxes, ID) as mended:
        mended.mark_begun("netns")
    assert again(known).begun == ["netns"]
    assert again(known).seq == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("\n", "cannot be read"),
        ("{}\n", "cannot be read"),
        ("[1]\n", "cannot be read"),
        ("null\n", "cannot be read"),
        ("hello\n", "cannot be read"),
        ('{"kind": "journal/v1"', "cannot be read"),
        ('{"kind": "journal/v1"}\n', "cannot be read"),
        ('{"kind": "journal/v2"}\n', "of another release"),
        ('{"kind": 5}\n', "is foreign"),
        ("HEADER\n\n", "cannot be read"),
        ("HEADER\n5\n", "cannot be read"),
        ('HEADER\n{"seq": 1}\n', "cannot be read"),
        ('HEADER\n{"seq": 1, "t": "x", "event": "danced"}\n', "unknown event 'danced'"),
        ('HEADER\n{"seq": 1, "t": "x", "event": "done", "stage": "netns"}\n', "cannot be read"),
        ('HEADER\n{"seq": 1, "t"\n{"seq": 2, "t": "x", "event": "attempt", "attempt": 2}\n', "cannot be"),
        ("HEADER\n\udcff\n", "cannot be read"),
        ("SPEC\n", "cannot be read"),
    ],
)
def test_what_is_no_journal_is_an_error_that_names_it(known, sandboxes, content, words):
    """It is shown by the audit; nothing is claimed about the sandbox, and the others go on."""
    header = text(known).strip()
    broken = header.replace('"args":["true"]', '"args":[]')
    content = content.replace("HEADER", header).replace("SPEC", broken)
    (known.folder / FILE).write_bytes(content.encode(errors="surrogateescape"))
    good = journal.create(sandboxes, "sb-" + "0" * 16, attempt=1, batch="b", spec=SPEC)
    with pytest.raises(JournalError, match=words):
        again(known)
    journals, errors = journal.read_all(sandboxes)
    assert [one.container_id for one in journals] == [good.container_id]
    assert [str(known.folder) in error.what for error in errors] == [True]


def test_a_journal_in_a_folder_of_another_name_is_refused(known, sandboxes):
    """A copy that somebody made: its undo would act on the sandbox that it was copied from."""
    known.folder.rename(sandboxes / "sb-ffffffffffffffff")
    with pytest.raises(JournalError, match="its folder has another name"):
        journal.read(sandboxes / "sb-ffffffffffffffff")


def test_read_all_passes_over_what_has_no_id_for_a_name(known, sandboxes):
    (sandboxes / "lost+found").mkdir()
    (sandboxes / "sb-notes.txt").touch()
    assert [one.container_id for one in journal.read_all(sandboxes)[0]] == [ID]
    assert journal.read_all(sandboxes)[1] == []
    assert journal.read_all(sandboxes / "none") == ([], [])


def test_a_sandbox_that_is_not_here_is_said_to_be_unknown(sandboxes):
    with pytest.raises(JournalError, match="not known on this host"), journal.locked(sandboxes, ID):
        pass


def test_the_lock_keeps_twins_apart(known, sandboxes):
    """Redis may deliver a message twice: both copies run at once, in two processes."""
    code = (
        "import sys; from pathlib import Path; from worker import journal\n"
        "with journal.locked(Path(sys.argv[1]), sys.argv[2]): print('mine', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(sandboxes), ID]
    twin = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with twin:
        assert twin.stdout.readline() == b"mine\n"
        with pytest.raises(Busy, match="another task works on it"), journal.locked(sandboxes, ID):
            pass
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(lambda: journal.locked(sandboxes, ID, wait_s=30).__enter__().seq)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            twin.kill()  # the kernel drops the lock of a process that is killed
            assert waiting.result(timeout=30) == 0


def test_busy_after_the_wait(known, sandboxes):
    with (
        journal.locked(sandboxes, ID),
        pytest.raises(Busy),
        journal.locked(sandboxes, ID, wait_s=0.05),
    ):
        pass


def test_the_lock_is_free_after_an_error(known, sandboxes):
    with pytest.raises(RuntimeError), journal.locked(sandboxes, ID):
        raise RuntimeError
    with journal.locked(sandboxes, ID) as mine:
        assert mine == known


def test_who_waited_for_the_lock_of_a_sandbox_that_ends_finds_it_gone(known, sandboxes):
    """The folder that it has locked is no longer there."""
    with ThreadPoolExecutor() as pool:
        with journal.locked(sandboxes, ID) as mine:
            waiting = pool.submit(journal.locked(sandboxes, ID, wait_s=30).__enter__)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
            mine.remove()
        with pytest.raises(JournalError, match="not known on this host"):
            waiting.result(timeout=30)


def test_remove_leaves_nothing(known, sandboxes):
    """Not the log, not the temporary file of a process that was killed while it began the journal."""
    known.log_path.touch()
    (known.folder / f".{FILE}.123").touch()
    known.remove()
    assert os.listdir(sandboxes) == []


def test_bundle_and_log_lie_in_the_sandboxs_folder(known, sandboxes):
    assert known.bundle == sandboxes / ID / "bundle"
    assert known.log_path.parent == sandboxes / ID


# -- journals that cannot be read ------------------------------------------------------------------

HEADER = json.dumps(
    {
        "kind": "journal/v1",
        "id": ID,
        "attempt": 1,
        "batch": "b",
        "boot_id": "x",
        "t": "t",
        "spec": {"args": ["a"]},
    },
    separators=(",", ":"),
)
HEADER += "\n"
UNREADABLE = [
    ("", "empty"),
    ("\n \n", "empty"),
    ("hello\n", "foreign"),
    ('{"apiVersion": 1}\n', "foreign"),
    ('{"kind": "Pod"}\n', "foreign"),
    ('["kind"]\n', "foreign"),
    ("\0\0\0\0\n", "foreign"),
    (HEADER.replace("sb-", "sc-"), "foreign"),
    ('{"kind": "journal/v2"}\n', "release-journal_v2"),
    ('{"kind": "journal/../../../etc/x y"}\n', "release-journal_.._.._.._etc_x_y"),
    (HEADER + '{"seq": 1, "t": "x", "event": "danced"}\n', "release-journal_v1"),
    (HEADER.strip(), "torn"),
    (HEADER + '{"seq":\n{"seq": 2, "t": "x", "event": "attempt", "attempt": 2}\n', "torn"),
    (HEADER + "\0\0\0\0\n", "torn"),
    (HEADER + "[" * 100_000 + "\n", "torn"),
    (HEADER + '{"seq": "x", "t": "x", "event": "undone", "stage": "netns"}\n', "torn"),
    (HEADER + '{"seq": 1, "t": 5, "event": "facts", "facts": null}\n', "torn"),
    (HEADER.replace('"b"', '"b'), "torn"),
]


@pytest.mark.parametrize(("content", "kind"), UNREADABLE)
def test_a_journal_that_cannot_be_read_is_set_aside_under_a_name_that_says_why(
    known, sandboxes, content, kind
):
    """An operator sees at a glance what it is; its bytes are kept as they are."""
    (known.folder / FILE).write_text(content)
    aside = journal.set_aside(known.folder)

    assert aside is not None
    assert re.fullmatch(rf"journal\.jsonl\.{re.escape(kind)}-\d{{8}}T\d{{6}}", aside.name)
    assert aside.read_text() == content
    assert os.listdir(known.folder) == [aside.name]
    assert journal.set_aside_files(known.folder) == [aside]
    assert journal.set_aside(known.folder) is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_what_is_no_file_is_no_journal_and_is_not_opened(known, sandboxes, make):
    """A pipe would make the worker wait for ever, and a link may lead anywhere."""
    (known.folder / FILE).unlink()
    make(known.folder / FILE)
    aside = journal.set_aside(known.folder)
    assert aside is not None
    assert ".foreign-" in aside.name


def test_a_journal_that_can_be_read_is_not_set_aside(known, sandboxes):
    assert journal.set_aside(known.folder) is None
    assert journal.set_aside(sandboxes / "none") is None


def test_no_new_journal_takes_the_place_of_one_that_was_set_aside(known, sandboxes):
    """The sandbox may still hold something that only its old journal speaks of."""
    (known.folder / FILE).write_text("")
    journal.set_aside(known.folder)
    with pytest.raises(JournalError, match=r"set aside as journal.jsonl.empty-.*audit --mend"):
        journal.create(sandboxes, ID, attempt=2, batch="b", spec=SPEC)
    with (
        pytest.raises(JournalError, match="has no journal any more: it was set aside"),
        journal.locked(sandboxes, ID),
    ):
        pass


def test_a_look_without_the_lock_does_not_cut_a_line_that_is_being_written(known, sandboxes):
    """A long line may be seen by halves: to cut it would lose an event that its writer has noted."""
    with (known.folder / FILE).open("a") as out:
        out.write('{"seq": 1, "event": "beg')
    before = text(known)
    journal.read_all(sandboxes)
    assert text(known) == before


def test_a_file_or_a_link_with_the_name_of_a_sandbox_holds_up_no_other(known, sandboxes, tmp_path):
    (sandboxes / "sb-0000000000000001").write_text("")
    (sandboxes / "sb-0000000000000002").symlink_to(tmp_path)
    journals, errors = journal.read_all(sandboxes)
    assert [one.container_id for one in journals] == [ID]
    assert [error.kind for error in errors] == ["", ""]
    for name in ("sb-0000000000000001", "sb-0000000000000002"):
        with pytest.raises(JournalError, match="not known on this host"), journal.locked(sandboxes, name):
            pass


def test_an_error_under_the_lock_stays_what_it_is(known, sandboxes):
    with pytest.raises(FileNotFoundError), journal.locked(sandboxes, ID):
        raise FileNotFoundError


def test_who_waited_for_a_folder_that_was_made_anew_locks_the_new_one(known, sandboxes):
    """Else two of them would work on one sandbox, each with the lock of another folder."""
    with ThreadPoolExecutor() as pool:
        with journal.held(sandboxes, ID) as folder:
            waiting = pool.submit(journal.locked(sandboxes, ID, wait_s=30).__enter__)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
            folder.rename(sandboxes / "old")
            journal.create(sandboxes, ID, attempt=7, batch="b", spec=SPEC)
        assert waiting.result(timeout=30).attempt == 7


def test_an_event_that_cannot_be_written_has_not_happened(known):
    """A full disk: the next event must be readable, and what is on disk is what the caller was told."""
    known.mark_begun("netns")
    size = (known.folder / FILE).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the kernel writes 10 bytes of the line
    try:
        with pytest.raises(OSError, match="No space left"):
            known.mark_done("netns", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (known.seq, known.is_done("netns")) == (1, False)
    known.mark_failed("netns", "disk full")
    assert again(known) == known


@pytest.mark.parametrize(
    "event",
    [
        {"event": "facts", "facts": {"restarts": "1"}},
        {"event": "facts", "facts": {"restart_at": 5}},
        {"event": "facts", "facts": {"final": "gone"}},
        {"event": "facts", "facts": {"stop": {"at": "2026-11-25T09:17:55Z", "grace_s": "1", "reason": "a"}}},
        {"event": "facts", "facts": []},
        {"event": "attempt", "attempt": "2"},
        {"event": "failed", "stage": "netns", "message": 1},
        {"event": "done", "stage": "network", "data": {"ips": 7, "result": {}}},
        {"event": "done", "stage": "network", "data": {"ips": [], "result": {}, "attachments": []}},
        {"event": "done", "stage": "image", "data": {"digest": 5}},
        {"event": "begun", "stage": "network", "intent": {"attachments": [{"if_name": "eth0"}]}},
        {"event": "begun", "stage": "network", "intent": {"attachments": 5}},
        {"event": "begun", "stage": None, "intent": {}},
        {"event": "done", "data": {}},
        {"event": "done", "stage": "image", "data": {"digest": "a", "spec": {"args": [7]}}},
        {"event": "done", "stage": "image", "data": {"digest": "a", "spec": {"env": None}}},
        {"event": "facts", "facts": {"publish": [{"host_port": 1, "port": 2, "host_ip": None}]}},
        {"event": "begun", "stage": "ready", "intent": {}, "t": None},
        {"event": "begun", "stage": "ready", "intent": {}, "seq": None},
    ],
)
def test_an_event_of_another_shape_makes_a_journal_unreadable_and_ends_no_reader(known, event):
    """Whoever read it next failed, as a worker's start did, and with it that of all other sandboxes."""
    with (known.folder / FILE).open("a") as file:
        file.write(json.dumps({"seq": 1, "t": journal.now(), **event}) + "\n")
    with pytest.raises(JournalError) as caught:
        again(known)
    assert caught.value.kind == "torn"


def test_facts_that_a_later_release_has_added_are_passed_over(known):
    known.set_facts(mood=["good"], restarts=2)
    known.mark_done("netns", {"colour": 5})
    assert again(known).facts == {"mood": ["good"], "restarts": 2}
