"""How fast sandboxes come up and go down, through the whole system and without it.

    python -m bench.launch -n 24 -p 4 [--rounds 3] [--bare] [--json]

A round launches N sandboxes, P at a time, each until it answers HTTP 200, then takes them down, P at
a time; once as `ours` (broker, worker, record, journal) and once as `bare` (the same stages in P
threads). The halves alternate and change places with each round, and the ratios are those of one
round, since no machine is equally fast all the time. All of it happens in network and mount
namespaces of its own; at the end nothing is left, or the exit status is 1.
"""

import contextlib
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.ground import Ground, enter_own_namespaces, errors_for_humans, say
from bench.halves import Bare, Ours, Row
from bench.meter import Meter
from worker.doctor import check_host
from worker.probe_runsc import probe
from worker.stages import Host, make_host

OUT = Path(__file__).parent / "out"
FIGURES = {
    "up_rate": "up, a second",
    "down_rate": "down, a second",
    "up_p50_s": "up, median, s",
    "up_p99_s": "up, 99 of 100, s",
    "cpu_per_launch_s": "CPU of a launch and its end, s",
    "cpu_up_s": "  of it up",
    "cpu_down_s": "  of it down",
}


@dataclass(frozen=True)
class Lap:
    """One round of one half: wall and CPU seconds of its sandboxes."""

    half: str
    rows: Sequence[Row]
    up_s: float
    down_s: float
    cpu_up_s: float
    cpu_down_s: float


def main(
    count: Annotated[int, typer.Option("-n", min=1, help="Sandboxes in a round, each half.")] = 24,
    at_a_time: Annotated[int, typer.Option("-p", min=1, help="Launches at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the figures are their medians.")] = 3,
    bare: Annotated[bool, typer.Option("--bare", help="Only the half without the system.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Launch sandboxes with and without sandbatch, and compare."""
    with errors_for_humans():
        enter_own_namespaces()
        laps, facts, is_clean = _measure(count, at_a_time, rounds, ("bare",) if bare else ("ours", "bare"))
    document = {"n": count, "p": at_a_time, "rounds": rounds, **facts, **summary(laps)}
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console(highlight=False).print(_table(document))
    raise typer.Exit(0 if is_clean else 1)


def summary(laps: Sequence[Lap]) -> dict[str, Any]:
    """The figures of `ours`, the same under `bare`, and the ratios; a half that did not run has nulls."""
    by_half = {half: [lap for lap in laps if lap.half == half] for half in ("ours", "bare")}
    pairs = list(zip(by_half["ours"], by_half["bare"], strict=False))
    return {
        **_figures(by_half["ours"]),
        "bare": _figures(by_half["bare"]),
        # Rates of equal counts: their ratio is that of the seconds, turned over.
        "up_ratio": _median([bare.up_s / ours.up_s for ours, bare in pairs]),
        "down_ratio": _median([bare.down_s / ours.down_s for ours, bare in pairs]),
    }


def _figures(laps: Sequence[Lap]) -> dict[str, float | None]:
    ups = sorted(row.up_s for lap in laps for row in lap.rows if row.up_s is not None)
    cpu_up_s, cpu_down_s = (
        _median([cpu_s / len(lap.rows) for lap, cpu_s in parts])
        for parts in ([(lap, lap.cpu_up_s) for lap in laps], [(lap, lap.cpu_down_s) for lap in laps])
    )
    return {
        "up_rate": _median([len(lap.rows) / lap.up_s for lap in laps]),
        "down_rate": _median([len(lap.rows) / lap.down_s for lap in laps]),
        "up_p50_s": _median(ups),
        "up_p99_s": round(ups[min(len(ups) - 1, int(len(ups) * 0.99))], 4) if ups else None,
        "cpu_per_launch_s": _median(
            [(lap.cpu_up_s + lap.cpu_down_s) / len(lap.rows) for lap in laps],
        ),
        "cpu_up_s": cpu_up_s,
        "cpu_down_s": cpu_down_s,
    }


def _measure(
    count: int, at_a_time: int, rounds: int, names: Sequence[str]
) -> tuple[list[Lap], dict[str, Any], bool]:
    """All rounds, on a ground that is cleared afterwards, whatever happens."""
    ground, laps = Ground(at_a_time, count), []
    meter = Meter(ground.name)
    meter.enter("bare")
    OUT.mkdir(exist_ok=True)
    path = OUT / f"launch-{time.strftime('%Y%m%dT%H%M%S')}-{ground.name[-8:]}.jsonl"
    hosts: list[Host] = []
    with interrupts() as quiet:
        try:
            check_host(ground.ours)
            found = probe(ground.ours)
            hosts += [make_host(one, hides_sysctl=found.hides_sysctl) for one in (ground.ours, ground.bare)]
            with contextlib.ExitStack() as stack, path.open("w") as out:
                halves: dict[str, Ours | Bare] = {}
                stack.callback(quiet)  # first in, last out: the halves are closed in peace
                if "ours" in names:
                    meter.enter("ours")
                    try:
                        halves["ours"] = Ours(ground.ours, ground.environment(ground.ours), at_a_time)
                    finally:
                        meter.enter("bare")
                    stack.callback(halves["ours"].close)
                halves["bare"] = Bare(hosts[1], at_a_time)
                stack.callback(halves["bare"].close)
                stack.callback(quiet)
                for number in range(rounds + 1):  # round 0 warms up and is not counted
                    order = list(names) if number % 2 else list(reversed(names))
                    for name in order:
                        lap = _lap(halves[name], number, count if number else at_a_time, meter)
                        out.writelines(json.dumps(row.as_json()) + "\n" for row in lap.rows if number)
                        out.flush()
                        laps += [lap] if number else []
                        if number:
                            say(f"round {number} of {rounds}, {_words(lap)}")
                    if not number:
                        say("warm")
        finally:
            quiet()
            try:
                findings = ground.clear(hosts[0]) if hosts else ground.remove()
            finally:
                meter.close("ours", "bare")
            for one in findings:
                say(f"left over: {one.kind} {one.name}: {one.problem} ({one.detail})")
            say("audit: clean" if not findings else f"audit: {len(findings)} found")
    say(f"rows: {path}")
    facts = {"runsc": found.version, "cpu_source": meter.source, "rows": str(path), "audit": len(findings)}
    return laps, facts, not findings


def _lap(half: Ours | Bare, number: int, count: int, meter: Meter) -> Lap:
    # Ours costs what its broker and worker do, and what this process does as its client; bare only
    # the latter, so that the worker's heartbeats meanwhile are not laid at its door.
    groups = ("ours", "bare") if half.name == "ours" else ("bare",)
    rows = [Row(number, half.name) for _ in range(count)]

    def timed(act: Callable[[Sequence[Row]], None]) -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), meter.read(*groups)
        act(rows)
        return time.perf_counter() - began, meter.read(*groups) - cpu_began

    up_s, cpu_up_s = timed(half.up)
    down_s, cpu_down_s = timed(half.down)
    return Lap(half.name, rows, up_s, down_s, cpu_up_s, cpu_down_s)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """SIGTERM ends us as Ctrl-C does; after `quiet()` neither disturbs the clearing up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def quiet() -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)

    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(one, interrupt) for one in numbers]
    try:
        yield quiet
    finally:
        for one, handler in zip(numbers, old, strict=True):
            signal.signal(one, handler)


def _table(document: dict[str, Any]) -> Table:
    title = f"{document['n']} sandboxes, {document['p']} at a time, median of {document['rounds']} rounds"
    table = Table("", "ours", "bare", "ours / bare", title=f"{title}, runsc {document['runsc']}")
    for name, words in FIGURES.items():
        ours, bare = document[name], document["bare"][name]
        ratio = document.get(name.replace("_rate", "_ratio")) if name.endswith("_rate") else None
        if ratio is None and ours is not None:
            ratio = ours / bare
        table.add_row(words, *("-" if one is None else f"{one:.3f}" for one in (ours, bare, ratio)))
    return table


def _words(lap: Lap) -> str:
    number = len(lap.rows)
    return f"{lap.half}: {number / lap.up_s:.2f} up, {number / lap.down_s:.2f} down a second"


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 4) if values else None


if __name__ == "__main__":
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    program.command()(main)
    program()
