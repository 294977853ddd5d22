"""Fault points: what the tests of crashes rely on."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from worker import faults, process
from worker.errors import ProcessTimeout, SandbatchError
from worker.faults import Rule


@pytest.fixture
def arm(tmp_path, monkeypatch):
    """Arm rules in this process for one test."""
    for name in ("_rules", "_counts", "_worker_lock"):
        monkeypatch.setattr(faults, name, getattr(faults, name))
    return lambda text: faults.arm(text, tmp_path)


def worker(tmp_path, rules: str, code: str) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a process that is a worker with these rules."""
    lines = (
        "import os, sys, pathlib; from worker import faults",
        "run_dir = pathlib.Path(sys.argv[1]); (run_dir / 'worker.lock').write_text(str(os.getpid()))",
        "faults.arm(sys.argv[2], run_dir)",
        code,
        "print('lived')",
    )
    argv = [sys.executable, "-c", "\n".join(lines), str(tmp_path), rules]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", ()),
        (" , ", ()),
        ("a:kill", (Rule("a", "kill", 1),)),
        ("stage.netns.do.before:exit1:3", (Rule("stage.netns.do.before", "exit1", 3),)),
        (
            "cni.*.ADD.?efore:hang, b:slow:0.5:2",
            (Rule("cni.*.ADD.?efore", "hang", 1), Rule("b", "slow:0.5", 2)),
        ),
        ("cni.host-local.DEL.after:enospc", (Rule("cni.host-local.DEL.after", "enospc", 1),)),
    ],
)
def test_rules_are_read(text, rules):
    assert faults.parse(text) == rules


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a:",
        ":kill",
        "a:dance",
        "a:kill:0",
        "a:kill:-1",
        "a:kill:x",
        "a:slow",
        "a b:kill",
        "a:kill;b:kill",
    ],
)
def test_a_rule_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is no point:action"):
        faults.parse(f"good:kill,{text}")


def test_without_rules_a_point_does_nothing(tmp_path, arm):
    arm("")
    faults.point("a")
    assert faults.program("a", ["true"]) == ["true"]
    assert os.listdir(tmp_path) == []


def test_a_point_acts_at_its_nth_pass_and_only_then(arm):
    arm("a.*:exit1:2")
    faults.point("a.b")
    faults.point("c")
    with pytest.raises(SandbatchError, match=r"fault point a\.c"):
        faults.point("a.c")
    faults.point("a.b")


def test_passes_are_counted_over_processes_and_restarts(tmp_path):
    """Stages are done by many pool processes; and a worker that was killed is not killed again."""
    for status in (0, 0, 1, 0):
        done = worker(tmp_path, "a:exit1:3", "faults.point('a')")
        assert done.returncode == status, done.stderr


def test_kill_ends_the_process_at_this_very_point(tmp_path):
    done = worker(tmp_path, "a:kill", "faults.point('b'); print('before', flush=True); faults.point('a')")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "before\n")


def test_kill_in_a_pool_process_ends_the_worker(tmp_path):
    """The crash to be tested is that of the whole worker."""
    code = "import signal\nif os.fork() == 0:\n    faults.point('a')\n    os._exit(0)\nsignal.pause()"
    done = worker(tmp_path, "a:kill", code)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_a_full_disk(arm):
    arm("a:enospc")
    with pytest.raises(OSError, match="No space left") as caught:
        faults.point("a")
    assert caught.value.errno == errno.ENOSPC


def test_slow_goes_on(arm):
    arm("a:slow:0.01")
    faults.point("a")


def test_a_program_fails_in_place_of_being_run(arm, tmp_path):
    arm("touch.before:exit1")
    assert process.run(["touch", tmp_path / "made"], timeout_s=10).returncode == 1
    assert not (tmp_path / "made").exists()
    assert process.run(["touch", tmp_path / "made"], timeout_s=10).returncode == 0


def test_a_program_hangs_until_its_deadline(arm):
    """Under the program's own name and point, so that the error is what it would be."""
    arm("cni.bridge.ADD.before:hang")
    with pytest.raises(ProcessTimeout, match="true: no end within"):
        process.run(["true"], timeout_s=0.3, point="cni.bridge.ADD")
    assert process.run(["true"], timeout_s=10, point="cni.bridge.ADD").returncode == 0


def test_after_a_program_is_after_its_work(arm, tmp_path):
    arm("touch.after:exit1")
    with pytest.raises(SandbatchError, match=r"touch\.after"):
        process.run(["touch", tmp_path / "made"], timeout_s=10)
    assert (tmp_path / "made").exists()
