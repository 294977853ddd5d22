"""What the bench makes of what it reads. Never how fast anything is."""

import io

import pytest
from rich.console import Console

from bench import podman
from bench.figures import summary, table
from bench.memory import kind_of, read_rollup

ROLLUP = """\
55d0c0a00000-7ffd3b5f2000 ---p 00000000 00:00 0                          [rollup]
Rss:               61048 kB
Pss:               33501 kB
Pss_Dirty:         30123 kB
Shared_Clean:      12000 kB
Private_Clean:       140 kB
Private_Dirty:     18964 kB
Swap:                  0 kB
"""
PROBE = {"what": "probe", "number": 0, "stages": {}}
ROWS = [
    {"what": "enqueue", "n": 10_000, "s": 3.0, "cpu_s": 1.0, "load": 1.0},
    {"what": "enqueue", "n": 10_000, "s": 2.0, "cpu_s": 0.8, "load": 1.0},
    {"what": "enqueue", "n": 10_000, "s": 2.5, "cpu_s": 0.9, "load": 1.5},
    {"what": "ls", "n": 10_000, "s": 0.6, "cpu_s": 0.4, "load": 1.0},
    {"what": "up", "n": 10, "s": 2.0, "load": 2.0},
    {"what": "up", "n": 90, "s": 30.0, "load": 2.0},
    *({**PROBE, "n": 10, "up_s": up_s, "down_s": 0.1, "load": 2.0} for up_s in (0.2, 0.3, 0.9)),
    *({**PROBE, "n": 100, "up_s": up_s, "down_s": 0.1, "load": 2.0} for up_s in (0.2, 0.36, 0.4)),
    {"what": "memory", "n": 0, "total": 10**9, "broker": 1, "worker": [1], "pool": [1], "load": 2.0},
    {"what": "memory", "n": 100, "total": 180 * 10**6, "broker": 20 * 10**6,
     "worker": [40 * 10**6] * 2, "pool": [20 * 10**6] * 4, "load": 7.0},
    {"what": "machine memory", "n": 100, "used": 1500 * 10**6, "load": 7.0},
    {"what": "audit", "found": 0, "load": 2.0},
]  # fmt: skip


def test_memory_is_read_from_the_kernels_sums() -> None:
    assert read_rollup(ROLLUP) == (61048 << 10, 33501 << 10, 19104 << 10)


@pytest.mark.parametrize(
    ("words", "parent", "kind"),
    [
        ("/usr/bin/tini -s -- /venv/bin/python -m cli worker", "", "tini"),
        ("/venv/bin/python -m cli worker ", "tini", "worker"),
        ("/venv/bin/python -m cli worker ", "worker", "pool"),
        ("/usr/bin/conmon --cid sb-1 ", "tini", "conmon"),
        ("runsc-sandbox --root=/run/sandbatch/runsc boot --bundle=/x ", "tini", "sandbox"),
        ("runsc-gofer --root=/run/sandbatch/runsc gofer --bundle=/x ", "tini", "gofer"),
        ("/usr/bin/runsc --root=/run/sandbatch/runsc gofer --bundle=/x ", "tini", "gofer"),
        ("", "sandbox", "sandbox"),
        ("/opt/valkey-server 198.19.0.1:6379 ", "", "broker"),
        ("nsenter --target=23 -- python -m cli worker", "", "other"),
    ],
)
def test_processes_are_told_apart_by_their_words_and_parents(words: str, parent: str, kind: str) -> None:
    """A pool process has the words of its worker; what runs in a sandbox has none."""
    assert kind_of(words, parent) == kind


def test_figures_of_a_scale_run_are_medians_ratios_and_the_largest() -> None:
    found = summary(ROWS)
    assert (found["enqueue_s"], found["ls_s"], found["ls_json_s"]) == (2.5, 0.6, None)
    assert (found["up_few_s"], found["up_many_s"], found["up_ratio"]) == (0.3, 0.36, 1.2)
    assert (found["up_rate"], found["down_rate"]) == (3.0, None)
    assert (found["memory_mb"], found["worker_mb"], found["pool_mb"]) == (180.0, 80.0, 80.0)
    assert (found["workers"], found["pool_processes"], found["sandbox_mb"]) == (2, 4, 15.0)
    assert (found["audit"], found["load"]) == (0, 7.0)


def test_the_table_says_which_goals_are_met() -> None:
    document = {"live": 100, "few": 10, "hosts": 2, "slots": 2, "specs": 10_000, "runsc": "r1"}
    console = Console(file=io.StringIO(), width=120)
    console.print(table({**document, **summary(ROWS)}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    verdicts = {
        words: line.split()[-2]
        for words in ("run --count 10000", "`ls` of 10000", "workers and broker", "audits")
        for line in lines
        if words in line
    }
    assert verdicts == {
        "run --count 10000": "met",
        "`ls` of 10000": "missed",
        "workers and broker": "met",
        "audits": "met",
    }
    assert not any("ls --json" in line for line in lines), "it was not measured"


def test_podman_is_compared_round_by_round() -> None:
    """No machine is equally fast all the time: the ratio is that of one round, and of these the median."""
    laps = [
        {"round": number, "half": half, "up_rate": up, "down_rate": 2 * up, "load": load}
        for number, ours, theirs, load in ((1, 3.0, 1.0, 1.0), (2, 8.0, 4.0, 3.0), (3, 6.0, 4.0, 2.0))
        for half, up in (("ours", ours), ("podman", theirs))
    ]
    found = podman.summary(laps)
    assert (found["ours_up"], found["podman_up"], found["up_ratio"]) == (6.0, 4.0, 2.0)
    assert (found["down_ratio"], found["load"]) == (2.0, 3.0)
    document = {"n": 4, "p": 2, "rounds": 3, "runsc": "r1", "idle": True, **found}
    console = Console(file=io.StringIO(), width=120)
    console.print(podman.table(document))
    assert "≥ 1.5: met" in console.file.getvalue()  # type: ignore[attr-defined]
