"""Programs that we run: their words, their end, and that they end with us."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker import process
from worker.errors import ProcessTimeout, SandbatchError

LONG_S = 30.0


@pytest.fixture
def held(tmp_path):
    """A named pipe: its reader has the end of the file once the last process that holds it has ended."""
    path = tmp_path / "held"
    os.mkfifo(path)
    return path


def test_what_a_program_writes_and_how_it_ends():
    done = process.run(["sh", "-c", "cat; echo words >&2; exit 3"], timeout_s=LONG_S, stdin="ü\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "ü\n", "words\n")


def test_environment_and_folder_are_those_given(tmp_path):
    env = {"A": "1", "PATH": os.environ["PATH"]}
    done = process.run(["sh", "-c", "echo $A; pwd"], timeout_s=LONG_S, env=env, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1", str(tmp_path)]


def test_much_output_on_both_pipes_does_not_block():
    """Each pipe holds 64 KiB; a plugin may write its whole log."""
    script = "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2"
    done = process.run(["sh", "-c", script], timeout_s=LONG_S)
    assert (len(done.stdout), len(done.stderr)) == (1_000_000, 1_000_000)


def test_a_program_that_reads_no_stdin_is_no_error():
    assert process.run(["true"], timeout_s=LONG_S, stdin="x" * 1_000_000).returncode == 0


def test_bytes_that_are_no_text_are_shown_as_such():
    assert process.run(["printf", r"a\377b"], timeout_s=LONG_S).stdout == "a\ufffdb"


def test_a_signals_end_is_a_negative_status():
    assert process.run(["sh", "-c", "kill -TERM $$"], timeout_s=LONG_S).returncode == -signal.SIGTERM


@pytest.mark.parametrize("name", ["no-such-program", "/no/such/program", "/etc/passwd", "/tmp"])
def test_a_program_that_cannot_be_started_is_an_error_that_names_it(name):
    with pytest.raises(SandbatchError, match=r"cannot be started .*; run sandbatch doctor") as caught:
        process.run([name], timeout_s=LONG_S)
    assert caught.value.what == name.rpartition("/")[2]


def test_a_folder_that_is_gone_is_named(tmp_path):
    """Else the error would say that the program is not there."""
    with pytest.raises(SandbatchError, match=f"true: cannot be started .*{tmp_path}/gone"):
        process.run(["true"], timeout_s=LONG_S, cwd=tmp_path / "gone")


def test_at_the_deadline_the_program_is_killed_with_its_children(held):
    """A delegate of a plugin is a child of it."""
    script = f"exec 3> {held}; trap '' TERM INT; sleep {LONG_S} & sleep {LONG_S}"
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(held.read_bytes)
        with pytest.raises(ProcessTimeout, match=r"^sh: no end within 0\.5 s; killed"):
            process.run(["sh", "-c", script], timeout_s=0.5)
        assert reading.result(timeout=10) == b""


def test_a_child_that_keeps_the_pipe_is_killed_at_the_deadline(held):
    """The program itself has ended; only its child still writes to us."""
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(held.read_bytes)
        with pytest.raises(ProcessTimeout):
            process.run(["sh", "-c", f"exec 3> {held}; sleep {LONG_S} &"], timeout_s=0.5)
        assert reading.result(timeout=10) == b""


def test_an_interrupt_leaves_nothing_running(held):
    """Celery's soft time limit comes as an exception in the middle of the wait."""

    class SoftTimeLimit(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise SoftTimeLimit

    old = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ThreadPoolExecutor() as pool:
            reading = pool.submit(held.read_bytes)
            script = f"exec 3> {held}; sleep {LONG_S} & read go; kill -USR1 $PPID; sleep {LONG_S}"
            with pytest.raises(SoftTimeLimit):
                process.run(["sh", "-c", script], timeout_s=LONG_S, stdin="go\n")
            assert reading.result(timeout=10) == b""
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_program_dies_with_the_process_that_runs_it(held):
    """A killed worker's runsc must not go on beside the one that the next worker starts."""
    script = f"echo $$ > {held}; exec sleep {LONG_S}"
    code = f"from worker import process; process.run(['sh', '-c', {script!r}], timeout_s={LONG_S})"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        child = os.pidfd_open(int(held.read_text()))
        try:
            assert select.select([child], [], [], 0)[0] == []
            parent.kill()
            assert select.select([child], [], [], 10)[0] == [child]
        finally:
            os.close(child)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ""), ("\n \n", ""), ("one\ntwo\n\n", "two"), ("one", "one"), ("a\n" + "x" * 500, "x" * 400)],
)
def test_last_words_are_the_last_line_that_says_something(text, words):
    assert process.last_words(text) == words


# -- what pulls of images need -----------------------------------------------------------------------


def test_output_is_there_byte_for_byte_too():
    """A digest is of bytes: line ends, and what is no text, count."""
    done = process.run(["printf", r"a\r\nb\377"], timeout_s=LONG_S)
    assert (done.raw, done.stdout) == (b"a\r\nb\xff", "a\nb\ufffd")


def test_a_tick_looks_on_and_the_output_is_kept():
    ticks = []
    script = "cat; echo a; sleep 0.5; echo b"
    done = process.run(["sh", "-c", script], timeout_s=LONG_S, stdin="in\n", tick=lambda: ticks.append(1))
    assert done.stdout == "in\na\nb\n"
    assert 1 <= len(ticks) <= 3


def test_what_a_tick_raises_ends_the_program_and_its_children(held, tmp_path):
    begun = tmp_path / "begun"

    def tick():
        if begun.exists():
            raise SandbatchError("image", "is too large")

    script = f"exec 3> {held}; sleep {LONG_S} & touch {begun}; wait"
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(held.read_bytes)
        with pytest.raises(SandbatchError, match="too large"):
            process.run(["sh", "-c", script], timeout_s=LONG_S, tick=tick)
        assert reading.result(timeout=10) == b""


def test_the_deadline_holds_beside_ticks():
    with pytest.raises(ProcessTimeout, match=r"no end within 0.5 s"):
        process.run(["sleep", "60"], timeout_s=0.5, tick=lambda: None)


def test_no_file_grows_beyond_its_limit(tmp_path):
    argv = ["sh", "-c", f"head -c 100000 /dev/zero > {tmp_path}/zeros"]
    assert process.run(argv, timeout_s=LONG_S, largest_file=5000).returncode != 0
    assert (tmp_path / "zeros").stat().st_size <= 5000
