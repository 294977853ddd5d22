"""How conmon is started and understood, and which processes an undo ends. conmon and runsc are doubles."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from worker import conmon, procs
from worker.errors import HostNotReady, ProcessTimeout, RunscError
from worker.runsc import Runsc, last_message
from worker.settings import Settings

CONTAINER_ID = "sb-00000000000000c1"
OTHER_ID = "sb-00000000000000c2"
NAMESPACE = Path("/proc/self/ns/mnt")
SLEEPER = "import time; time.sleep(60)"
# Records how it was called; answers as conmon does; with "hang" it never answers.
CONMON = f"""#!{sys.executable}
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
with open(here + "/called.json", "w") as file:
    json.dump({{"argv": sys.argv, "env": dict(os.environ), "fds": fds, "sid": os.getsid(0)}}, file)
answer = open(here + "/answer").read()
if answer == "hang":
    if os.fork() == 0:
        time.sleep(60)
else:
    os.write(int(os.environ["_OCI_SYNCPIPE"]), answer.encode())
    sys.stderr.write("conmon's own words")
"""


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("conmon", CONMON), ("runsc", "#!/bin/sh\necho '-overlay2 value'\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "answer").write_text('{"data": 4711}\n')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def settings(tmp_path):
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def runsc(settings, bin_dir):
    return replace(Runsc.from_settings(settings, hides_sysctl=False), timeout_s=2.0)


@pytest.fixture
def bundle_dir(settings):
    folder = settings.sandboxes_dir / CONTAINER_ID / "bundle"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def create(runsc, settings, bundle_dir):
    def call():
        log_path, netns_path = bundle_dir.parent / "log", Path("/var/run/netns") / CONTAINER_ID
        conmon.create_in(NAMESPACE, runsc, settings, CONTAINER_ID, bundle_dir, log_path, netns_path)

    return call


@pytest.fixture
def sleeper(runsc):
    """Start a process with a command line of choice, as runsc's and conmon's are."""
    started = []

    def start(*words):
        process = subprocess.Popen([words[0], "-c", SLEEPER, *words[1:]], executable=sys.executable)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_conmon_gets_runsc_with_its_flags_and_the_bundle(create, runsc, settings, bundle_dir, bin_dir):
    create()
    argv = json.loads((bin_dir / "called.json").read_text())["argv"]
    assert argv[argv.index("-r") + 1] == shutil.which("nsenter")
    runtime = [f"--mount={NAMESPACE}", str(runsc.binary), *runsc.global_args()]
    assert [f"--runtime-arg={arg}" for arg in runtime] == [a for a in argv if "runtime-arg" in a]
    assert argv[argv.index("--exit-dir") + 1] == str(settings.exit_dir)
    assert argv[argv.index("-l") + 1] == f"k8s-file:{bundle_dir.parent / 'log'}"


def test_conmon_inherits_neither_our_secrets_nor_our_files(create, bin_dir, tmp_path, monkeypatch):
    """It lives as long as the sandbox: a lock that it held would never come free."""
    monkeypatch.setenv("SANDBATCH_BROKER_URL", "redis://:secret@broker")
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        create()
        called = json.loads((bin_dir / "called.json").read_text())
        assert lock.fileno() not in called["fds"]
    assert "SANDBATCH_BROKER_URL" not in called["env"]
    assert called["sid"] != os.getsid(0)


def test_runscs_own_words_reach_the_error(create, bin_dir):
    words = 'creating container: cannot read "config.json"\n'
    (bin_dir / "answer").write_text(json.dumps({"data": -1, "message": words}) + "\n")
    with pytest.raises(RunscError, match=r'cannot read "config\.json"'):
        create()


def test_an_answer_that_is_no_json_is_an_error_with_its_text(create, bin_dir):
    (bin_dir / "answer").write_text('{"data": -1, "message": "bad \\q escape"}\n')
    with pytest.raises(RunscError, match="bad"):
        create()


def test_conmon_that_dies_without_an_answer_is_an_error_with_its_last_words(create, bin_dir):
    (bin_dir / "answer").write_text("")
    with pytest.raises(RunscError, match="conmon's own words"):
        create()


def test_conmon_that_never_answers_is_ended_with_all_of_its_id(create, runsc, bin_dir):
    (bin_dir / "answer").write_text("hang")
    runsc_timeout_s = runsc.timeout_s
    began = time.monotonic()
    with pytest.raises(ProcessTimeout):
        create()
    assert time.monotonic() - began < runsc_timeout_s + 3
    assert procs.processes_of(runsc.root, CONTAINER_ID) == []


def test_a_host_without_conmon_is_not_ready(create, bin_dir, monkeypatch):
    (bin_dir / "conmon").unlink()
    (bin_dir / "setpriv").symlink_to(shutil.which("setpriv"))
    monkeypatch.setenv("PATH", str(bin_dir))
    with pytest.raises(HostNotReady, match="conmon"):
        create()


def test_a_bundle_outside_a_folder_of_its_id_is_a_mistake_of_ours(runsc, settings, tmp_path):
    """By that folder the undo finds the gofer of the 2024 runsc, which has no id on its command line."""
    with pytest.raises(ValueError, match="no folder named"):
        conmon.create_in(NAMESPACE, runsc, settings, CONTAINER_ID, tmp_path, tmp_path / "log", Path("/netns"))


def test_end_container_ends_every_process_of_the_id(runsc, bundle_dir, settings, sleeper):
    root = f"--root={runsc.root}"
    ours = [
        sleeper("runsc-sandbox", root, "boot", f"--bundle={bundle_dir}", CONTAINER_ID),
        sleeper("runsc-gofer", root, "gofer", f"--bundle={bundle_dir}"),
        sleeper("conmon", "-c", CONTAINER_ID, f"--runtime-arg={root}"),
        sleeper("runsc", root, "create", CONTAINER_ID),
    ]
    _wait_for(lambda: len(procs.processes_of(runsc.root, CONTAINER_ID)) == 4)
    assert {p.role for p in procs.processes_of(runsc.root, CONTAINER_ID)} == {
        "sandbox",
        "gofer",
        "conmon",
        "runsc",
    }
    conmon.end_container(runsc, CONTAINER_ID, bundle_dir, settings.exit_dir)
    assert [process.wait(1) for process in ours] == [-9] * 4


def test_end_container_leaves_strangers_alone(runsc, bundle_dir, settings, sleeper):
    """Another id, another tool's runsc root, a `tail` of the log, our own command line."""
    root = f"--root={runsc.root}"
    strangers = [
        sleeper("runsc-sandbox", root, "boot", OTHER_ID),
        sleeper("runsc-sandbox", root, "boot", CONTAINER_ID + "0"),
        sleeper("runsc-sandbox", "--root=/run/containerd/runsc", "boot", CONTAINER_ID),
        sleeper("runsc-sandbox", root + "2", "boot", CONTAINER_ID),
        sleeper("tail", "-f", str(bundle_dir / "log")),
        sleeper("sandbatch", "rm", CONTAINER_ID),
    ]
    _wait_for(lambda: len(procs.all_sandbox_processes(runsc.root)) >= 1)
    conmon.end_container(runsc, CONTAINER_ID, bundle_dir, settings.exit_dir)
    assert [process.poll() for process in strangers] == [None] * 6


def test_a_reused_pid_is_not_signalled(runsc, sleeper):
    process = sleeper("runsc-sandbox", f"--root={runsc.root}", "boot", CONTAINER_ID)
    _wait_for(lambda: procs.processes_of(runsc.root, CONTAINER_ID))
    [found] = procs.processes_of(runsc.root, CONTAINER_ID)
    assert procs.end([replace(found, start_time=found.start_time - 1)], timeout_s=0.2) == []
    assert process.poll() is None


def test_end_container_removes_what_a_killed_runsc_left_and_nothing_of_others(runsc, bundle_dir, settings):
    mine = [
        runsc.root / f"{CONTAINER_ID}_sandbox:{CONTAINER_ID}.state",
        runsc.root / f"runsc-{CONTAINER_ID}.sock",  # makes the next create of the id fail
        settings.exit_dir / CONTAINER_ID,
        settings.exit_dir / f"{CONTAINER_ID}.A1B2C3",  # conmon killed while it wrote
        bundle_dir / "attach",
    ]
    others = [
        runsc.root / f"{OTHER_ID}_sandbox:{OTHER_ID}.state",
        runsc.root / f"{CONTAINER_ID}0_sandbox:x.state",
        settings.exit_dir / OTHER_ID,
        bundle_dir / "config.json",
    ]
    for path in (*mine, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    conmon.end_container(runsc, CONTAINER_ID, bundle_dir, settings.exit_dir)
    conmon.end_container(runsc, CONTAINER_ID, bundle_dir, settings.exit_dir)
    assert [path for path in mine if path.exists()] == []
    assert all(path.exists() for path in others)


def test_exit_code_is_none_until_conmon_has_written_it(tmp_path):
    assert conmon.exit_code(tmp_path, CONTAINER_ID) is None
    (tmp_path / CONTAINER_ID).write_text("137")
    assert conmon.exit_code(tmp_path, CONTAINER_ID) == 137


def test_tail_log_joins_parts_of_long_lines_and_drops_the_stamps(tmp_path):
    stamp = "2026-11-24T13:00:00.000000000+00:00"
    lines = ["stdout F one", "stderr F two", "stdout P th", "stdout P r", "stdout F ee", "stdout F "]
    (tmp_path / "log").write_text("".join(f"{stamp} {line}\n" for line in lines))
    assert conmon.tail_log(tmp_path / "log", lines=3) == "two\nthree\n"
    assert conmon.tail_log(tmp_path / "missing") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"msg":"first","level":"error"}{"msg":"say \\"no\\"","level":"error"}', 'say "no"'),
        ("running container: starting\nlast line\n", "last line"),
        ("panic: index out of range\n\ngoroutine 1 [running]:\nmain.main()\n", "panic: index out of range"),
        ("", "it said nothing"),
        ("x" * 5000, "x" * 400),
    ],
)
def test_last_message_of_runsc(text, words):
    assert last_message(text) == words


def _wait_for(is_so):
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline, "the doubles did not start"
        time.sleep(0.01)


def test_conmon_bounds_the_log(create, settings, bin_dir):
    create()
    argv = json.loads((bin_dir / "called.json").read_text())["argv"]
    assert f"--log-size-max={settings.log_max_bytes}" in argv


def test_a_full_log_of_an_earlier_start_is_begun_anew(create, bundle_dir, settings):
    """conmon counts only its own bytes: a sandbox that is restarted for ever would fill the disk."""
    log_path = bundle_dir.parent / "log"
    with log_path.open("wb") as log:
        log.truncate(settings.log_max_bytes - 1)
    create()
    assert log_path.stat().st_size == settings.log_max_bytes - 1
    with log_path.open("ab") as log:
        log.write(b"x")
    create()
    assert not log_path.exists() or log_path.stat().st_size == 0


@pytest.mark.parametrize("raw", [b"", b"\0\0\0", b"\x9a", b"a", b"1.5", b"1" * 5000, b"999", b"-7"])
def test_an_exit_file_that_is_none_says_nothing(tmp_path, raw):
    """After a power cut: the worker's start read it and failed."""
    (tmp_path / "sb-0123456789abcdef").write_bytes(raw)
    assert conmon.exit_code(tmp_path, "sb-0123456789abcdef") is None
