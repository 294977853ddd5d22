"""conmon's log files, read as they are: bytes, parts of lines, torn ends, and from any place on."""

import asyncio
import os
from typing import Any

import pytest

from worker import journal
from worker.calls import make_call
from worker.errors import BadInput, SandbatchError
from worker.follow import send_log
from worker.k8s_log import LogFile, Shower, cursor_of, parse, read_cursor, start_of
from worker.settings import Settings
from worker.spec import make_spec
from worker.watch import Folders

ID = "sb-0123456789abcdef"
BOTH = ("stdout", "stderr")


def line(text: bytes, stream: str = "stdout", tag: str = "F", second: int = 0) -> bytes:
    return f"2026-11-25T01:00:{second:02d}.123456789+00:00 {stream} {tag} ".encode() + text + b"\n"


@pytest.fixture
def log(tmp_path):
    opened = []

    def make(*lines: bytes) -> LogFile:
        path = tmp_path / f"log{len(opened)}"
        path.write_bytes(b"".join(lines))
        opened.append(LogFile(path))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def shown(log: LogFile, **fields: Any) -> bytes:
    shower = Shower(**{"streams": BOTH, **fields})
    return b"".join(shower.show(record) for record in log.records())


@pytest.mark.parametrize(
    "torn",
    [b"", b"2026-11-25T", b"2026-11-25T01:00:00Z stdout", b"x stdout F a", b"2026 stdlog F a", b"\0\0"],
)
def test_a_torn_line_is_no_record(torn):
    """A full disk or a kill of conmon may leave any part of one."""
    assert parse(torn) is None


def test_text_is_kept_byte_for_byte(log):
    every = bytes(set(range(256)) - {10})
    assert shown(log(line(every), line(b""), line(b"  two "))) == every + b"\n\n  two \n"


def test_parts_of_a_line_are_joined_also_across_the_other_stream(log):
    """conmon cuts where a read of its own ends; the other stream may write in between."""
    made = log(line(b"a", tag="P"), line(b"err", "stderr"), line(b"b", tag="P"), line(b"c"))
    assert shown(made, streams=("stdout",)) == b"abc\n"
    made.offset = 0
    assert shown(made, streams=("stderr",)) == b"err\n"


def test_a_last_line_without_a_newline_gets_none(log):
    assert shown(log(line(b"part", tag="P"))) == b"part"


def test_each_line_has_one_time_stamp(log):
    made = log(line(b"a", tag="P"), line(b"b"), line(b"c", second=1))
    stamp = b"2026-11-25T01:00:0%d.123456789+00:00 "
    assert shown(made, timestamps=True) == stamp % 0 + b"ab\n" + stamp % 1 + b"c\n"


def test_what_is_being_written_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "log"
    whole = line(b"later")
    path.write_bytes(whole[:20])
    made = LogFile(path)
    assert list(made.records()) == []
    with path.open("ab") as out:
        out.write(whole[20:])
    assert [record.text for record in made.records()] == [b"later"]
    made.close()


@pytest.mark.parametrize(
    ("tail", "since", "streams", "expected"),
    [
        (2, None, BOTH, b"three\nfour\n"),
        (1, None, ("stderr",), b"two\n"),
        (0, None, BOTH, b""),
        (99, None, BOTH, b"one\ntwo\nthree\nfour\n"),
        (None, 2, BOTH, b"three\nfour\n"),
        (1, 2, BOTH, b"four\n"),
        (None, 99, BOTH, b""),
    ],
)
def test_tail_and_since_choose_lines_not_records(log, tail, since, streams, expected):
    """A long line is many records."""
    parts = (line(b"thr", tag="P", second=2), line(b"ee", second=2), line(b"four", second=3))
    made = log(line(b"one"), line(b"two", "stderr", second=1), *parts)
    first = next(iter(made.records())).at
    made.offset = 0
    moment = None if since is None else first + since - 0.5
    made.offset = start_of(made, since=moment, tail=tail, streams=streams)
    assert shown(made, streams=streams) == expected


def test_a_cursor_says_where_to_go_on_within_a_line_too(log):
    made = log(line(b"a", tag="P"), line(b"b"))
    shower = Shower(BOTH, timestamps=True)
    first = next(made.records())
    shower.show(first)
    identity, offset, mid = read_cursor(cursor_of(made, first.end, shower))
    assert (identity, offset, mid) == (made.identity, first.end, {"stdout": True, "stderr": False})
    with pytest.raises(BadInput, match="cursor"):
        read_cursor("12 x; 3")


# -- sent to a client ------------------------------------------------------------------------------


class Heard:
    """A client's end: what it got."""

    def __init__(self) -> None:
        self.text, self.notes, self.cursor = {"stdout": b"", "stderr": b""}, [], ""
        self.came = asyncio.Event()

    async def output(self, stream: str, data: bytes, cursor: str = "") -> None:
        self.text[stream] += data
        self.cursor = cursor
        self.came.set()

    async def note(self, words: str) -> None:
        self.notes.append(words)

    async def until(self, data: bytes) -> None:
        while data not in self.text["stdout"]:
            self.came.clear()
            await asyncio.wait_for(self.came.wait(), 5)


@pytest.fixture
def settings(tmp_path):
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def known(settings):
    spec = make_spec(args=["true"])
    return journal.create(settings.sandboxes_dir, ID, attempt=1, batch="b", spec=spec)


def follow(settings, act, **fields):
    """Follow the log while `act` does something to it; what was heard."""

    async def both():
        folders, heard = Folders(), Heard()
        watching = asyncio.create_task(folders.run())
        call = make_call("logs", call_id="0" * 32, container_id=ID, **{"follow": True, **fields})
        following = asyncio.create_task(send_log(settings, call, heard, folders))
        try:
            await act(heard)
            await asyncio.wait_for(following, 5)
        finally:
            following.cancel()
            watching.cancel()
            await asyncio.gather(watching, following, return_exceptions=True)
        return heard

    return asyncio.run(both())


def rotate(known, *lines: bytes) -> None:
    """As conmon does at the limit."""
    new = known.log_path.with_name("container.log.tmp")
    new.write_bytes(b"".join(lines))
    new.rename(known.log_path)


def append(known, *lines: bytes) -> None:
    with known.log_path.open("ab") as out:
        out.write(b"".join(lines))


def test_a_follower_hears_everything_until_the_sandbox_has_ended(settings, known):
    """From before the log is there, over a rotation, to what was written last."""

    async def act(heard):
        append(known, line(b"one"))
        await heard.until(b"one")
        append(known, line(b"two"))
        rotate(known, line(b"three"))
        await heard.until(b"three")
        append(known, line(b"four"), line(b"torn")[:-1])
        known.set_facts(wanted="exited", final="exited")
        known.remove()

    assert follow(settings, act).text["stdout"] == b"one\ntwo\nthree\nfour\ntorn\n"


def test_a_follower_goes_on_at_its_cursor(settings, known):
    """Nothing is lost or doubled over a restart of the worker, and of a rotation meanwhile it is told."""
    append(known, line(b"one"), line(b"two"))

    async def first(heard):
        await heard.until(b"two")
        append(known, line(b"three", tag="P"))
        await heard.until(b"three")
        known.set_facts(note=1)
        known.set_facts(final="exited")

    before = follow(settings, first)
    append(known, line(b"!"))

    async def nothing(heard):
        await heard.until(b"!")

    again = follow(settings, nothing, cursor=before.cursor)
    assert before.text["stdout"] + again.text["stdout"] == b"one\ntwo\nthree!\n"
    assert again.notes == []
    rotate(known, line(b"new!", second=5))
    late = follow(settings, nothing, cursor=before.cursor)
    assert late.text["stdout"] == b"new!\n"
    assert "missing" in late.notes[0]


def test_without_follow_what_stands_there_is_sent(settings, known):
    append(known, line(b"one"), line(b"two", "stderr"))

    async def nothing(heard):
        """It ends by itself."""

    assert follow(settings, nothing, follow=False).text == {"stdout": b"one\n", "stderr": b"two\n"}


def test_a_sandbox_that_wrote_nothing_yet_has_an_empty_log(settings, known):
    async def nothing(heard):
        """It ends by itself."""

    assert follow(settings, nothing, follow=False).text["stdout"] == b""


def test_a_sandbox_without_any_log_is_an_error(settings):
    async def nothing(heard):
        """It ends by itself."""

    with pytest.raises(SandbatchError, match="no log of it"):
        follow(settings, nothing)


def test_followers_share_one_inotify(settings, known):
    """Its instances are few on a host: 128 for a user by default."""

    async def count():
        folders, heard = Folders(), [Heard() for _ in range(50)]
        watching = asyncio.create_task(folders.run())
        call = make_call("logs", call_id="0" * 32, container_id=ID, follow=True)
        tasks = [asyncio.create_task(send_log(settings, call, one, folders)) for one in heard]
        append(known, line(b"one"))
        await asyncio.gather(*(one.until(b"one") for one in heard))
        open_ones = sum("inotify" in os.readlink(f"/proc/self/fd/{fd}") for fd in _fds())
        known.set_facts(final="exited")
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return open_ones

    assert asyncio.run(count()) == 1


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize(
    "raw", [b"2 stdout F a\n", b"2026-99-99T00:00:00Z stdout F a\n", b"2026\xef stdout F a\n"]
)
def test_a_record_whose_time_is_none_ends_no_look_at_a_log(tmp_path, raw):
    (tmp_path / "log").write_bytes(raw)
    log = LogFile(tmp_path / "log")
    assert start_of(log, since=1e9, tail=None, streams=("stdout",)) == 0
    shower = Shower(("stdout",))
    assert read_cursor(cursor_of(log, 0, shower))[1] == 0
    log.close()


def test_a_cursor_with_an_offset_of_no_file_is_refused():
    with pytest.raises(BadInput):
        read_cursor("1 a " + "9" * 100 + " 00")
