"""The figures of `bench.scale`, made of its raw rows, and a table of them beside the goals."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

WORDS = {
    "enqueue_s": ("`run --count {specs}`, s", 5.0),
    "enqueue_cpu_s": ("  of it CPU of the client, s", None),
    "ls_s": ("`ls` of {specs}, s", 0.5),
    "ls_cpu_s": ("  of it CPU of the client, s", None),
    "ls_json_s": ("`ls --json` of {specs}, s", None),
    "up_few_s": ("a launch with {few} live, median, s", None),
    "up_many_s": ("a launch with {live} live, median, s", None),
    "up_ratio": ("  the second by the first", 1.3),
    "down_few_s": ("an end with {few} live, median, s", None),
    "down_many_s": ("an end with {live} live, median, s", None),
    "down_ratio": ("  the second by the first", None),
    "up_rate": ("up to {live}, a second", None),
    "down_rate": ("down from {live}, a second", None),
    "memory_mb": ("workers and broker with {live} live, MB", 200.0),
    "broker_mb": ("  of it the broker", None),
    "worker_mb": ("  main processes of {workers} workers", None),
    "pool_mb": ("  their {pool_processes} pool processes", None),
    "sandbox_mb": ("a sandbox, all that the machine has less, MB", None),
    "audit": ("found by the audits afterwards", 0),
    "load": ("load average, the highest", None),
}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the raw rows; None for what was not measured. Memory in MB of 10^6 bytes."""
    probes = [row for row in rows if row["what"] == "probe"]
    few, many = (of((row["n"] for row in probes), default=0) for of in (min, max))
    figures: dict[str, Any] = {
        f"{what.replace(' --', '_')}_{kind}": _median(row[kind] for row in rows if row["what"] == what)
        for what in ("enqueue", "ls", "ls --json")
        for kind in ("s", "cpu_s")
    }
    for way in ("up_s", "down_s"):
        at_few = _median(row[way] for row in probes if row["n"] == few)
        at_many = _median(row[way] for row in probes if row["n"] == many)
        ratio = round(at_many / at_few, 3) if at_few and at_many else None
        name = way.removesuffix("_s")
        figures |= {f"{name}_few_s": at_few, f"{name}_many_s": at_many, f"{name}_ratio": ratio}
    for way in ("up", "down"):
        runs = [row for row in rows if row["what"] == way]
        big = max(runs, key=lambda row: int(row["n"]), default=None)
        figures[f"{way}_rate"] = round(big["n"] / big["s"], 3) if big else None
    memory = [row for row in rows if row["what"] == "memory"]
    worst = max(memory, key=lambda row: (int(row["n"]), int(row["total"])), default=None)
    if worst:
        figures |= {
            "memory_mb": _mb(worst["total"]),
            "broker_mb": _mb(worst["broker"]),
            "workers": len(worst["worker"]),
            "worker_mb": _mb(sum(worst["worker"])),
            "pool_processes": len(worst["pool"]),
            "pool_mb": _mb(sum(worst["pool"])),
        }
    used = [row for row in rows if row["what"] == "machine memory"]
    figures["sandbox_mb"] = _mb(used[-1]["used"] / used[-1]["n"]) if used else None
    figures["audit"] = next((row["found"] for row in rows if row["what"] == "audit"), None)
    figures["load"] = max((row["load"] for row in rows), default=None)
    return figures


def table(document: dict[str, Any]) -> Table:
    """Figures and goals, a line each; what was not measured is left out."""
    title = "{live} sandboxes over {hosts} hosts, {slots} at a time on each, runsc {runsc}".format(**document)
    made = Table("", "measured", "goal", "", title=title)
    for name, (words, goal) in WORDS.items():
        value = document.get(name)
        if value is None:
            continue
        verdict = "" if goal is None else "met" if value <= goal else "missed"
        made.add_row(words.format(**document), f"{value:g}", "" if goal is None else f"≤ {goal:g}", verdict)
    return made


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 4) if found else None


def _mb(size: float) -> float:
    return round(size / 1e6, 1)
