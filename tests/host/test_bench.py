"""The benchmark measures both halves and leaves nothing. Never how fast: that is for people to judge."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("host_parts")

ROOT = Path(__file__).parent.parent.parent
FIGURES = {"up_rate", "down_rate", "up_p50_s", "up_p99_s", "cpu_per_launch_s"}
STAGES = {"netns", "network", "bundle", "container", "ready"}
TIMEOUT_S = 150


def traces() -> set[str]:
    """What a bench has on the machine while it runs: folders, cgroups, processes."""
    folders = [*Path("/var/tmp").glob("sandbatch-bench-*"), *Path("/run").glob("sandbatch-bench-*")]
    cgroups = Path("/sys/fs/cgroup").glob("**/sandbatch-bench-*")
    found = {str(one) for one in (*folders, *cgroups)}
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if "/sandbatch-bench-" in words:
            found.add(f"{line.parent.name} {words}")
    return found


@pytest.fixture
def new_traces() -> Iterator[Any]:
    """What is there that was not: another bench may be at work on the same machine."""
    before = traces()
    return lambda: traces() - before


def start(*args: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "bench.launch", *args]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_run_gives_every_figure_of_both_halves_and_leaves_nothing(new_traces: Any) -> None:
    """The one object that scripts read, the raw rows behind it, and a machine as it was before."""
    with start("-n", "2", "-p", "2", "--rounds", "1", "--json") as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 0, stderr
    document = json.loads(stdout)
    for figures in (document, document["bare"]):
        assert all(figures[name] > 0 for name in FIGURES)
    assert document["up_ratio"] == pytest.approx(document["up_rate"] / document["bare"]["up_rate"], rel=0.01)
    assert document["down_ratio"] == pytest.approx(
        document["down_rate"] / document["bare"]["down_rate"], rel=0.01
    )

    path = Path(document["rows"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    assert f"rows: {path}" in stderr
    assert sorted(row["half"] for row in rows) == ["bare", "bare", "ours", "ours"]
    assert len({row["id"] for row in rows}) == 4
    for row in rows:
        assert row["round"] == 1
        assert row["up_s"] > 0
        assert row["down_s"] > 0
        assert set(row["stages"]) == STAGES
        assert set(row["undos"]) >= STAGES - {"ready"}

    assert document["audit"] == 0
    assert "audit: clean" in stderr
    assert new_traces() == set()


def test_an_interrupted_run_leaves_nothing(new_traces: Any) -> None:
    """Ctrl-C comes when sandboxes are half-way up: each is undone from wherever it was."""
    with start("-n", "6", "-p", "3", "--rounds", "1", "--bare") as process:
        assert process.stderr is not None
        assert "warm" in process.stderr.readline()  # now the first round begins
        deadline = time.monotonic() + 30
        while not any("conmon" in one for one in new_traces()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 130, stderr
    assert "audit: clean" in stderr
    assert new_traces() == set()


def test_a_run_that_nobody_listens_to_any_more_leaves_nothing(new_traces: Any) -> None:
    """A closed terminal or a killed `| tee` must not end the clearing up half-way."""
    with start("-n", "2", "-p", "2", "--rounds", "1", "--bare") as process:
        assert process.stderr is not None
        assert "warm" in process.stderr.readline()
        process.stderr.close()
        process.wait(TIMEOUT_S)

    assert new_traces() == set()
