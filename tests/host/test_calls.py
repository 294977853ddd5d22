"""`logs` and `exec` on a whole host, by the command line."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.host.system import System

TICKS = 'i=0; while :; do i=$((i+1)); echo "tick $i"; sleep 0.1; done'
IDLE = ("--", "sleep", "1000")


Begin = Callable[..., "subprocess.Popen[bytes]"]


def call(
    system: System, *args: str, stdin: bytes = b"", timeout_s: float = 60
) -> "subprocess.CompletedProcess[bytes]":
    """`sandbatch` with bytes in and out."""
    argv = [sys.executable, "-m", "cli", *args]
    done = subprocess.run(
        argv, capture_output=True, env=system.environment, input=stdin, timeout=timeout_s, check=False
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start commands that go on; ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(system: System, *args: str) -> "subprocess.Popen[bytes]":
            argv, pipe = [sys.executable, "-m", "cli", *args], subprocess.PIPE
            made = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=system.environment)
            stack.callback(end, made)
            return made

        yield start


def end(command: "subprocess.Popen[bytes]") -> None:
    command.kill()
    with contextlib.suppress(ValueError):  # its pipes are closed already
        command.communicate()


@pytest.fixture(scope="module")
def sandbox(system: System) -> Iterator[str]:
    """One for all tests that leave it as it is."""
    (container_id,) = system.run("--wait", "--env", "COLOUR=red", "--cwd", "/tmp", *IDLE)
    yield container_id
    system.cli("rm", container_id)
    assert system.audit() == []


def processes(system: System, container_id: str) -> str:
    return call(system, "exec", container_id, "--", "ps", "axo", "args").stdout.decode()


def exec_files(system: System) -> list[str]:
    return os.listdir(system.run_dir / "execs") if (system.run_dir / "execs").is_dir() else []


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("exit 128", 128)]
)
def test_exec_ends_as_its_command(system: System, sandbox: str, script: str, code: int):
    done = call(system, "exec", sandbox, "--", "sh", "-c", f"echo out; echo err >&2; {script}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--", "nope"), 127, 'error finding executable "nope"'),
        (("--", "/etc/passwd"), 126, "permission denied"),
        (("--cwd", "/nowhere", "--", "ls"), 126, "working directory"),
        ((), 2, "the command is empty"),
        (("--env", "1=2", "--", "ls"), 2, "no name of an environment variable"),
    ],
)
def test_exec_says_why_nothing_ran(system: System, sandbox: str, args, code: int, words: str):
    done = call(system, "exec", sandbox, *args)
    assert done.returncode == code
    assert words in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_exec_has_the_environment_of_the_sandbox_and_what_is_added(system: System, sandbox: str):
    done = call(
        system, "exec", "-e", "SIZE=two words", sandbox, "sh", "-c", 'echo "$COLOUR $SIZE $PWD"; id -u'
    )
    assert done.stdout == b"red two words /tmp\n0\n"
    others = ("-w", "/usr", "-u", "1000:1000")
    done = call(system, "exec", *others, sandbox, "sh", "-c", "pwd; id -u; id -g")
    assert done.stdout == b"/usr\n1000\n1000\n"


def test_ten_megabytes_go_through_exec_both_ways(system: System, sandbox: str):
    data = os.urandom(10_000_000)
    script = "tee /tmp/copy; sha256sum < /tmp/copy >&2; rm /tmp/copy"
    done = call(system, "exec", "-i", sandbox, "--", "sh", "-c", script, stdin=data)
    assert done.stdout == data
    assert done.stderr.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_what_ends_an_exec_ends_its_command_inside(system: System, sandbox: str, begin: Begin):
    """Its time, its output's limit, Ctrl-C, a client that is killed; its children, too."""
    tree = "sleep 501 & sh -c 'sleep 502; true'; true"
    late = call(system, "exec", sandbox, "--timeout", "1", "--", "sh", "-c", tree)
    assert (late.returncode, b"ran longer than 1 s" in late.stderr) == (124, True)
    flood = call(system, "exec", sandbox, "--output-limit", "1m", "--", "sh", "-c", "yes; sleep 503")
    assert (flood.returncode, len(flood.stdout)) == (1, 1 << 20)
    assert b"wrote more than 1048576 bytes" in flood.stderr
    interrupted = begin(system, "exec", sandbox, "--", "sh", "-c", "echo begun; sleep 504")
    assert interrupted.stdout.readline() == b"begun\n"
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(20) == 130
    system.wait_until(lambda: exec_files(system) == [], 10, "end of the exec")
    assert "sleep 50" not in processes(system, sandbox)


def test_a_child_that_is_left_behind_does_not_hold_an_exec(system: System, sandbox: str):
    """As docker has it: it ends with its command, whoever still has its streams."""
    began = time.monotonic()
    done = call(system, "exec", sandbox, "--", "sh", "-c", "(sleep 60; echo late) & echo started")
    assert (done.returncode, done.stdout) == (0, b"started\n")
    assert time.monotonic() - began < 20


def test_thirty_execs_and_a_follower_take_no_launch_slot(system: System, sandbox: str, begin: Begin):
    """Slots are 4: launches go on beside many times as many calls."""
    follower = begin(system, "logs", "-f", sandbox)
    with ThreadPoolExecutor(30) as pool:
        calls = [
            pool.submit(
                call, system, "exec", "-i", sandbox, "--", "sh", "-c", f"cat; exit {number}", timeout_s=80
            )
            for number in range(30)
        ]
        launched = system.run("--count", "4", "--wait", *IDLE)
        assert [one.result().returncode for one in calls] == list(range(30))
    assert len(launched) == 4
    system.cli("rm", *launched)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == 130


def test_beyond_its_exec_slots_a_host_refuses_in_words(make_system, begin: Begin):
    system = make_system(SANDBATCH_EXEC_SLOTS="1")
    system.start()
    (container_id,) = system.run("--wait", *IDLE)
    first = begin(system, "exec", "-i", container_id, "--", "sh", "-c", "echo begun; cat")
    assert first.stdout.readline() == b"begun\n"
    second = call(system, "exec", container_id, "--", "true")
    assert (second.returncode, b"1 commands of exec run on it" in second.stderr) == (1, True)
    first.communicate(timeout=10)
    assert first.returncode == 0
    assert call(system, "exec", container_id, "--", "true").returncode == 0


def test_a_killed_worker_leaves_no_exec_behind(system: System, sandbox: str, begin: Begin):
    """The client says that the host went away; the next worker ends the command inside."""
    running = begin(system, "exec", sandbox, "--", "sh", "-c", "echo begun; sleep 505")
    assert running.stdout.readline() == b"begun\n"
    system.kill_worker()
    assert len(exec_files(system)) == 1
    system.start()
    _, words = running.communicate(timeout=20)
    assert (running.returncode, b"its worker was started anew" in words) == (1, True)
    assert "sleep 505" not in processes(system, sandbox)
    assert exec_files(system) == []


def test_a_follower_misses_nothing_over_a_kill_of_the_worker(system: System, begin: Begin):
    (container_id,) = system.run("--wait", "--", "sh", "-c", TICKS)
    follower = begin(system, "logs", "-f", container_id)
    assert follower.stdout.readline() == b"tick 1\n"
    system.kill_worker()
    system.start()
    for number in range(2, 40):
        assert follower.stdout.readline() == f"tick {number}\n".encode()
    last = call(system, "logs", "--tail", "1", container_id).stdout
    number = int(last.split()[1])
    assert number >= 39
    for expected in range(40, number + 1):
        assert follower.stdout.readline() == f"tick {expected}\n".encode()
    follower.send_signal(signal.SIGINT)
    _, words = follower.communicate(timeout=10)
    assert b"the log goes on once it is back" in words
    system.cli("rm", container_id)


def test_logs_since_tail_time_stamps_and_streams(system: System):
    # conmon reads two pipes: only time puts what comes by one before what comes by the other.
    script = "echo one; sleep 2; echo two; echo err >&2; sleep 1; printf part; sleep 1000"
    (container_id,) = system.run("--wait", "--", "sh", "-c", script)
    system.wait_until(lambda: b"part" in call(system, "logs", container_id).stdout, 20, "the last word")
    whole = call(system, "logs", container_id)
    assert (whole.stdout, whole.stderr) == (b"one\ntwo\npart", b"err\n")
    assert call(system, "logs", "--tail", "1", container_id).stdout == b"part"
    assert call(system, "logs", "--stream", "stderr", container_id).stdout == b""
    stamped = call(system, "logs", "-t", container_id).stdout.splitlines()
    moment = stamped[1].split()[0].decode()
    assert call(system, "logs", "--since", moment, container_id).stdout == b"two\npart"
    assert call(system, "logs", "--since", "3600", container_id).stdout == b"one\ntwo\npart"
    assert call(system, "logs", "--since", "yesterday", container_id).returncode == 2
    system.cli("rm", container_id)


def test_a_follower_goes_on_over_a_full_log(make_system, begin: Begin):
    """conmon begins the file anew at its limit; who follows reads both."""
    system = make_system(SANDBATCH_LOG_MAX_BYTES=str(1 << 16))
    system.start()
    count = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; [ $((i%50)) = 0 ] && sleep 0.1; done"
    script = f"echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; {count}; sleep 1000"
    (container_id,) = system.run("--wait", "--", "bash", "-c", script)
    follower = begin(system, "logs", "-f", container_id)
    assert follower.stdout.readline() == b"begun\n"
    call(system, "exec", container_id, "--", "touch", "/tmp/go")
    for number in range(1, 2001):
        assert follower.stdout.readline() == f"line {number}\n".encode()
    follower.kill()
    follower.communicate()
    assert (system.sandboxes / container_id / "container.log").stat().st_size <= 1 << 16
    assert call(system, "logs", "--tail", "1", container_id).stdout == b"line 2000\n"


def test_calls_that_cannot_be_are_refused_in_words(system: System):
    assert call(system, "logs", "sb-ffffffffffffffff").returncode == 2
    assert call(system, "exec", "sb-ffffffffffffffff", "--", "true").returncode == 2
    (ended,) = system.run("--wait", *IDLE)
    system.cli("rm", ended)
    done = call(system, "exec", ended, "--", "true")
    assert (done.returncode, b"has ended" in done.stderr) == (1, True)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_cp_of_a_folder_in_and_out_again(system: System, sandbox: str, tmp_path: Path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(3_000_000))
    (source / "sub" / "two words").write_bytes(os.urandom(1000))
    (source / "link").symlink_to("sub/two words")
    assert call(system, "cp", str(source), f"{sandbox}:/tmp").returncode == 0
    assert call(system, "cp", str(source), f"{sandbox}:/tmp/renamed").returncode == 0
    listed = call(
        system, "exec", sandbox, "--", "sh", "-c", "cd /tmp; stat -c %u:%g source/big; readlink renamed/link"
    )
    assert listed.stdout == b"0:0\nsub/two words\n"
    for inside, name in (("/tmp/source", "back"), ("/tmp/renamed", "again")):
        assert call(system, "cp", f"{sandbox}:{inside}", str(tmp_path / name)).returncode == 0
        assert digests(tmp_path / name) == digests(source)
    one = call(system, "cp", f"{sandbox}:/tmp/source/big", str(tmp_path))
    assert (one.returncode, (tmp_path / "big").read_bytes()) == (0, (source / "big").read_bytes())
    packed = call(system, "cp", f"{sandbox}:/tmp/source/sub", "-").stdout
    assert call(system, "cp", "-", f"{sandbox}:/run", stdin=packed).returncode == 0
    assert call(system, "exec", sandbox, "--", "ls", "/run/sub").stdout == b"two words\n"
    call(system, "exec", sandbox, "--", "rm", "-r", "/tmp/source", "/tmp/renamed", "/run/sub")


def test_cp_says_what_cannot_be_copied(system: System, sandbox: str, tmp_path: Path):
    (tmp_path / "a").write_text("a")
    for args, words in (
        ((f"{sandbox}:/nowhere", str(tmp_path)), "No such file"),
        ((str(tmp_path / "a"), f"{sandbox}:/usr/a"), "Read-only file system"),
        ((f"{sandbox}:/usr/bin", str(tmp_path), "--output-limit", "64k"), "wrote more than 65536 bytes"),
        ((str(tmp_path / "none"), f"{sandbox}:/tmp"), "no such file"),
        ((str(tmp_path / "a"), str(tmp_path / "b")), "one of SRC and DST"),
    ):
        done = call(system, "cp", *args)
        assert done.returncode in (1, 2)
        assert words in done.stderr.decode()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "script", ["echo out; echo err >&2; exit 7", "echo out; echo err >&2; sleep 1; exit 7"]
)
def test_run_attach_is_as_the_program_itself(system: System, script: str):
    """A very short one has ended before its log can be asked for."""
    done = call(system, "run", "--attach", "--rm", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert b"err\n" in done.stderr
    system.wait_until(lambda: os.listdir(system.folder / "state" / "logs") == [], 10, "end of its log")


def test_ctrl_c_stops_what_is_attached(system: System, begin: Begin):
    script = "trap 'echo stopped; exit 0' TERM; echo begun; while :; do sleep 0.1; done"
    attached = begin(system, "run", "-a", "--", "sh", "-c", script)
    assert attached.stdout.readline() == b"begun\n"
    attached.send_signal(signal.SIGINT)
    rest, _ = attached.communicate(timeout=30)
    assert (attached.returncode, rest) == (130, b"stopped\n")
    assert all(row["state"] != "running" for row in system.ls().values() if "trap" in str(row["args"]))


def test_a_launch_that_fails_is_said_by_run_attach(system: System):
    done = call(system, "run", "--attach", "--", "nope")
    assert done.returncode == 1
    assert 'error finding executable "nope"' in done.stderr.decode()
    assert call(system, "run", "--attach", "-n", "2", "--", "true").returncode == 2
