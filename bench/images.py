"""What images cost: launches of a warm image beside those of `--rootfs host`, and a cold one for many.

    python -m bench.images -n 24 -p 4 [--rounds 3] [--cold 50] [--json]

A sandbox only sleeps, so that what is left is the launch itself. Halves alternate as in `bench.launch`,
through one system. COLD sandboxes of an image that the host does not have are enqueued in one batch, and
again once it has it: the seconds until all run, and what the registry was asked for meanwhile, by its own
log. The registry is Debian's docker-registry on the loopback of the bench's own network namespace; its
image is busybox and a layer that does not compress.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.ground import Ground, enter_own_namespaces, errors_for_humans, say
from bench.halves import Ours, Row, sleeper
from bench.launch import OUT, interrupts
from tests.images import make, registry
from worker.doctor import check_host
from worker.errors import HostNotReady
from worker.image_store import ImageStore
from worker.probe_runsc import probe
from worker.spec import Spec, make_spec
from worker.stages import make_host

GOAL = 0.9
NAME = "bench/image:1"
NOISE = 16 * 2**20


class Half:
    """Launches of one spec, through a system that others share."""

    def __init__(self, name: str, ours: Ours, spec: Spec) -> None:
        self.name = name
        self._ours, self._spec = ours, spec

    def up(self, rows: Sequence[Row]) -> None:
        self._ours.spec = self._spec
        self._ours.up(rows)

    def down(self, rows: Sequence[Row]) -> None:
        self._ours.down(rows)


def main(
    count: Annotated[int, typer.Option("-n", min=1, help="Sandboxes in a round, each half.")] = 24,
    at_a_time: Annotated[int, typer.Option("-p", min=1, help="Launches at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the figures are their medians.")] = 3,
    cold: Annotated[int, typer.Option(min=1, help="Sandboxes that ask for an absent image at once.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the raw rows.")] = OUT,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Launch sandboxes of an image and of the host's own programs, and compare."""
    with errors_for_humans():
        if registry.program() is None:
            raise HostNotReady("docker-registry", "not on the PATH", "make test-host")
        enter_own_namespaces()
        document, is_clean = _measure(count, at_a_time, rounds, cold, out)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console(highlight=False).print(table(document))
    raise typer.Exit(0 if is_clean else 1)


def _measure(count: int, at_a_time: int, rounds: int, cold: int, out: Path) -> tuple[dict[str, Any], bool]:
    """All rounds, on a ground that is cleared afterwards, whatever happens."""
    out.mkdir(parents=True, exist_ok=True)
    ground = Ground(at_a_time, max(count, cold))
    path = out / f"images-{time.strftime('%Y%m%dT%H%M%S')}-{ground.name[-8:]}.jsonl"
    laps: list[dict[str, Any]] = []
    colds: list[dict[str, Any]] = []
    with interrupts() as quiet:
        try:
            check_host(ground.ours)
            found = probe(ground.ours)
            host = make_host(ground.ours, hides_sysctl=found.hides_sysctl)
            with contextlib.ExitStack() as stack, path.open("w") as file:
                stack.callback(quiet)
                hub, conf = _registry(ground, stack)
                environment = {**ground.environment(ground.ours), "SANDBATCH_REGISTRIES_CONF": str(conf)}
                name = ground.ours.host
                image = make_spec(args=["sleep", "86400"], image=f"{hub.address}/{NAME}", host=name)
                ours = Ours(ground.ours, environment, at_a_time, sleeper(name))
                stack.callback(ours.close)
                stack.callback(quiet)
                store = ImageStore(ground.ours)
                for number in range(1, rounds + 1):
                    store.prune(0)
                    for half in ("cold", "warm"):
                        lap, rows = _at_once(ours, hub, image, Row(number, half), cold)
                        colds.append(lap)
                        file.writelines(json.dumps(row.as_json()) + "\n" for row in rows)
                        say(f"round {number} of {rounds}: {lap}")
                halves = (Half("image", ours, image), Half("host", ours, sleeper(name)))
                for number in range(rounds + 1):  # round 0 warms up and is not counted
                    for one in halves if number % 2 else halves[::-1]:
                        rows = [Row(number, one.name) for _ in range(count if number else at_a_time)]
                        lap = _timed(one, rows)
                        if number:
                            laps.append(lap)
                            file.writelines(json.dumps(row.as_json()) + "\n" for row in rows)
                            say(f"round {number} of {rounds}: {lap}")
        finally:
            quiet()
            findings = ground.clear(host)
            for one in findings:
                say(f"left over: {one.kind} {one.name}: {one.problem} ({one.detail})")
    facts: dict[str, Any] = {"n": count, "p": at_a_time, "rounds": rounds, "cold": cold}
    facts |= {"runsc": found.version, "rows": str(path)}
    say(f"rows: {path}")
    return {**facts, **summary(laps, colds), "audit": len(findings)}, not findings


def _registry(ground: Ground, stack: contextlib.ExitStack) -> tuple[registry.Registry, Path]:
    """A registry with the image, and the registries.conf that lets a host speak plain HTTP to it."""
    folder = ground.folder("registry")
    hub = stack.enter_context(registry.serving(registry.Registry(folder, folder / "storage")))
    layout = make.Layout(folder / "layout")
    layout.make("1", [make.busybox(), make.noise(NOISE)], {"env": [make.PATH]})
    hub.push(layout.folder, "1", NAME)
    return hub, registry.registries_conf(folder / "registries.conf", hub.address)


def _at_once(
    ours: Ours, hub: registry.Registry, spec: Spec, first: Row, count: int
) -> tuple[dict[str, Any], list[Row]]:
    """One batch of `count`, from its enqueueing until all run; then they are removed."""
    rows = [first, *(Row(first.round, first.half) for _ in range(count - 1))]
    hub.forget()
    ours.spec = spec
    began = time.perf_counter()
    ours.up_at_once(rows)
    up_s = time.perf_counter() - began
    ours.down(rows)
    asked = [one for one in hub.requests() if one.method == "GET" and "/blobs/" in one.path]
    return {
        "round": first.round,
        "half": first.half,
        "all_up_s": round(up_s, 3),
        "first_up_s": min(row.up_s for row in rows if row.up_s is not None),
        "blobs": len(asked),
        "load": round(os.getloadavg()[0], 2),
    }, rows


def _timed(half: Half, rows: Sequence[Row]) -> dict[str, Any]:
    began = time.perf_counter()
    half.up(rows)
    up = time.perf_counter()
    half.down(rows)
    down = time.perf_counter()
    return {
        "round": rows[0].round,
        "half": half.name,
        "up_rate": round(len(rows) / (up - began), 3),
        "down_rate": round(len(rows) / (down - up), 3),
        "load": round(os.getloadavg()[0], 2),
    }


def summary(laps: Sequence[dict[str, Any]], colds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of both halves, and of the ratios of each round; seconds of a cold batch and of a warm one."""
    by_half = {half: [lap for lap in laps if lap["half"] == half] for half in ("image", "host")}
    pairs = list(zip(by_half["image"], by_half["host"], strict=True))
    figures: dict[str, Any] = {"load": max(lap["load"] for lap in (*laps, *colds))}
    for way in ("up", "down"):
        for half in by_half:
            figures[f"{half}_{way}"] = statistics.median(lap[f"{way}_rate"] for lap in by_half[half])
        ratios = [image[f"{way}_rate"] / host[f"{way}_rate"] for image, host in pairs]
        figures[f"{way}_ratio"] = round(statistics.median(ratios), 3)
    for half in ("cold", "warm"):
        mine = [lap for lap in colds if lap["half"] == half]
        figures[f"{half}_all_up_s"] = statistics.median(lap["all_up_s"] for lap in mine)
        figures[f"{half}_first_up_s"] = statistics.median(lap["first_up_s"] for lap in mine)
        figures[f"{half}_blobs"] = max(lap["blobs"] for lap in mine)
    return figures


def table(document: dict[str, Any]) -> Table:
    title = "{n} sandboxes, {p} at a time, median of {rounds} rounds, runsc {runsc}".format(**document)
    made = Table("", "image", "--rootfs host", "ratio", "goal", title=title)
    for way, words in (("up", "up, a second"), ("down", "down, a second")):
        ratio = document[f"{way}_ratio"]
        verdict = f"≥ {GOAL}: {'met' if ratio >= GOAL else 'missed'}" if way == "up" else ""
        figures = (document[f"image_{way}"], document[f"host_{way}"], ratio)
        made.add_row(words, *(f"{one:.2f}" for one in figures), verdict)
    made.add_section()
    for half in ("cold", "warm"):
        words = f"{document['cold']} at once, {half}: all run, s"
        made.add_row(
            words, f"{document[f'{half}_all_up_s']:.2f}", "", "", f"{document[f'{half}_blobs']} blobs"
        )
    return made


if __name__ == "__main__":
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    program.command()(main)
    program()
