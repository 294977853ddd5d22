"""The same launches through sandbatch and through podman, both with runsc, by their ratio.

    python -m bench.podman -n 16 -p 4 [--rounds 3] [--idle] [--json]

A sandbox runs the web server of the tutorial from the same read-only root on a CNI bridge, and is up once it
answers HTTP 200. runsc has `network=host` for both, the host's stack in the sandbox's own netns: with its own
stack Debian 13's runsc starts on new kernels only in the mount namespace that sandbatch makes for it. podman
has its usual cgroups: with `--cgroups=disabled` it gives runsc a flag of crun's, which runsc does not know.
What it writes goes into folders, cgroups and namespaces of the bench's own. Halves alternate as in
`bench.launch`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from bench.ground import Ground, enter_own_namespaces, errors_for_humans, say
from bench.halves import Ours, Row, sleeper, web_server
from bench.launch import OUT, interrupts
from worker.doctor import check_host
from worker.errors import HostNotReady, SandbatchError
from worker.limits import trees
from worker.probe_runsc import probe
from worker.prober import until_ready
from worker.rootfs import host_rootfs
from worker.runsc import find_binary
from worker.settings import Settings
from worker.spec import Spec
from worker.stages import make_host

GOAL = 1.5
NETWORK, BRIDGE, FIRST = "bench", "sbbench-podman"[:15], IPv4Address("10.97.0.2")
CNI_STATE = Path("/var/lib/cni")
# The host's own may be lower than what podman asks for by itself.
ULIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


class Podman:
    """podman with storage, network, cgroups and settings of its own, `at_a_time` commands at once."""

    name = "podman"

    def __init__(self, settings: Settings, folder: Path, at_a_time: int, spec: Spec) -> None:
        self._folder = folder
        self._at_a_time = at_a_time
        self._spec = spec
        self._cgroup = folder.name
        self._free = [str(FIRST + number) for number in reversed(range(4 * at_a_time + 1000))]
        self._addresses: dict[str, str] = {}
        # A copy: podman makes files and mount points in it.
        shutil.copytree(host_rootfs(settings), folder / "rootfs", symlinks=True)
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": f"{FIRST - 2}/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(folder / "leases"),
            },
        }
        (folder / "net.d").mkdir()
        conflist = {"cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge]}
        (folder / "net.d" / f"{NETWORK}.conflist").write_text(json.dumps(conflist))
        config = folder / "containers.conf"
        config.write_text(
            f'[engine]\nlock_type = "file"\n[engine.runtimes]\nrunsc = ["{find_binary(settings)}"]\n'
        )
        self._env = {**os.environ, "CONTAINERS_CONF": str(config), "TMPDIR": str(folder)}
        flags = ("network=host", "ignore-cgroups", "overlay2=none", f"platform={settings.runsc_platform}")
        self._argv = [
            "podman",
            *(f"--{name}={folder / name}" for name in ("root", "runroot", "tmpdir")),
            f"--network-config-dir={folder / 'net.d'}",
            "--cgroup-manager=cgroupfs",
            "--events-backend=none",
            "--storage-driver=vfs",
            "--runtime=runsc",
            *(f"--runtime-flag={flag}" for flag in flags),
        ]

    def up(self, rows: Sequence[Row]) -> None:
        """Launch one container a row, until each has answered."""
        self._each(self._launch, rows)

    def down(self, rows: Sequence[Row]) -> None:
        self._each(self._take_down, rows)

    def close(self) -> None:
        """Remove whatever is left, and the cgroups."""
        self._podman("rm", "--all", "--force", "--time=0")
        for tree in trees():
            for folder, _, _ in os.walk(tree.mount / self._cgroup, topdown=False):
                Path(folder).rmdir()

    def _each(self, act: Callable[[Row], None], rows: Sequence[Row]) -> None:
        with ThreadPoolExecutor(self._at_a_time) as pool:
            for done in [pool.submit(act, row) for row in rows]:
                done.result()

    def _launch(self, row: Row) -> None:
        address = self._free.pop()
        began = time.perf_counter()
        row.id = self._podman(
            *("run", "--detach", f"--cgroup-parent=/{self._cgroup}", f"--network={NETWORK}"),
            *(f"--ip={address}", "--read-only", "--volume=/usr:/usr:ro", *ULIMITS),
            *(f"--workdir={self._spec.cwd}", "--rootfs", str(self._folder / "rootfs"), *self._spec.args),
        )
        self._addresses[row.id] = address
        known = cast("Any", SimpleNamespace(spec=self._spec, data={"network": {"ips": [address]}}))
        asyncio.run(asyncio.wait_for(until_ready(known), self._spec.ready_timeout_s))
        row.up_s = round(time.perf_counter() - began, 6)

    def _take_down(self, row: Row) -> None:
        began = time.perf_counter()
        self._podman("rm", "--force", "--time=0", row.id)
        row.down_s = round(time.perf_counter() - began, 6)
        self._free.append(self._addresses.pop(row.id))

    def _podman(self, *args: str) -> str:
        done = subprocess.run(
            [*self._argv, *args], env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SandbatchError(f"podman {args[0]}", done.stderr.strip()[-400:], "see podman's manual")
        return done.stdout.strip()


def main(
    count: Annotated[int, typer.Option("-n", min=1, help="Sandboxes in a round, each half.")] = 16,
    at_a_time: Annotated[int, typer.Option("-p", min=1, help="Launches at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the figures are their medians.")] = 3,
    idle: Annotated[
        bool, typer.Option("--idle", help="A program that only sleeps, instead of the web server.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the raw rows.")] = OUT,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Launch sandboxes with sandbatch and with podman, and compare."""
    with errors_for_humans():
        if shutil.which("podman") is None:
            raise HostNotReady("podman", "not on the PATH", "apt-get install -y podman")
        os.environ["SANDBATCH_RUNSC_NETWORK"] = "host"
        enter_own_namespaces()
        document, is_clean = _measure(count, at_a_time, rounds, out, idle=idle)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console(highlight=False).print(table(document))
    raise typer.Exit(0 if is_clean else 1)


def _measure(
    count: int, at_a_time: int, rounds: int, out: Path, *, idle: bool
) -> tuple[dict[str, Any], bool]:
    """All rounds, on a ground that is cleared afterwards, whatever happens."""
    CNI_STATE.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "sandbatch-bench", CNI_STATE], check=True)  # podman's, in there
    out.mkdir(parents=True, exist_ok=True)
    ground = Ground(at_a_time, count)
    path = out / f"podman-{time.strftime('%Y%m%dT%H%M%S')}-{ground.name[-8:]}.jsonl"
    laps: list[dict[str, Any]] = []
    with interrupts() as quiet:
        try:
            check_host(ground.ours)
            found = probe(ground.ours)
            host = make_host(ground.ours, hides_sysctl=found.hides_sysctl)
            with contextlib.ExitStack() as stack, path.open("w") as file:
                stack.callback(quiet)
                spec = (sleeper if idle else web_server)(ground.ours.host)
                ours = Ours(ground.ours, ground.environment(ground.ours), at_a_time, spec)
                stack.callback(ours.close)
                podman = Podman(ground.ours, ground.folder("podman"), at_a_time, spec)
                stack.callback(podman.close)
                stack.callback(quiet)
                for number in range(rounds + 1):  # round 0 warms up and is not counted
                    halves = (ours, podman) if number % 2 else (podman, ours)
                    for half in halves:
                        rows = [Row(number, half.name) for _ in range(count if number else at_a_time)]
                        lap = {"round": number, "half": half.name, **_timed(half, rows)}
                        if number:
                            laps.append(lap)
                            file.writelines(json.dumps(row.as_json()) + "\n" for row in rows)
                            say(f"round {number} of {rounds}: {lap}")
        finally:
            quiet()
            findings = ground.clear(host)
            for one in findings:
                say(f"left over: {one.kind} {one.name}: {one.problem} ({one.detail})")
    facts: dict[str, Any] = {"idle": idle}
    facts |= {"n": count, "p": at_a_time, "rounds": rounds, "runsc": found.version, "rows": str(path)}
    say(f"rows: {path}")
    return {**facts, **summary(laps), "audit": len(findings)}, not findings


def _timed(half: Ours | Podman, rows: Sequence[Row]) -> dict[str, float]:
    began = time.perf_counter()
    half.up(rows)
    up = time.perf_counter()
    half.down(rows)
    down = time.perf_counter()
    load = round(os.getloadavg()[0], 2)
    return {
        "up_rate": round(len(rows) / (up - began), 3),
        "down_rate": round(len(rows) / (down - up), 3),
        "load": load,
    }


def summary(laps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median rates of both, and the medians of the ratios of each round."""
    by_half = {half: [lap for lap in laps if lap["half"] == half] for half in ("ours", "podman")}
    pairs = list(zip(by_half["ours"], by_half["podman"], strict=True))
    figures: dict[str, Any] = {"load": max(lap["load"] for lap in laps)}
    for way in ("up", "down"):
        for half in by_half:
            figures[f"{half}_{way}"] = statistics.median(lap[f"{way}_rate"] for lap in by_half[half])
        ratios = [ours[f"{way}_rate"] / theirs[f"{way}_rate"] for ours, theirs in pairs]
        figures[f"{way}_ratio"] = round(statistics.median(ratios), 3)
    return figures


def table(document: dict[str, Any]) -> Table:
    what = "idle sandboxes" if document["idle"] else "web servers"
    title = "{n} {what}, {p} at a time, median of {rounds} rounds, runsc {runsc}".format(
        what=what, **document
    )
    made = Table("", "sandbatch", "podman", "ratio", "goal", title=title)
    for way, words in (("up", "up, a second"), ("down", "down, a second")):
        ratio = document[f"{way}_ratio"]
        verdict = f"≥ {GOAL}: {'met' if ratio >= GOAL else 'missed'}" if way == "up" else ""
        figures = (document[f"ours_{way}"], document[f"podman_{way}"], ratio)
        made.add_row(words, *(f"{one:.2f}" for one in figures), verdict)
    return made


if __name__ == "__main__":
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    program.command()(main)
    program()
