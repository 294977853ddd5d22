"""A thousand sandboxes over several hosts of this machine, and ten thousand in the queue.

    python -m bench.scale [--live 1000] [--specs 10000] [--hosts 4] [--out FOLDER] [--json]

The hosts are those of `make fleet`: each has network, mount and process namespaces of its own. What is
measured: `run` and `ls` of ten thousand, with a broker alone; then launches and ends one by one with few
sandboxes live, with many, and with few again, since no machine is equally fast all the time; the
memory of workers and broker meanwhile; and how fast many come and go. Raw rows are kept. SANDBATCH_RUNSC
chooses the runsc: an idle sandbox of Debian 13's keeps 3 % of a core busy, so that it needs a smaller --live.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from bench.figures import summary, table
from bench.ground import say
from bench.memory import WORKER_KINDS, measure
from tasks.app import make_app
from tasks.broker import embedded_broker
from tasks.state import TERMINAL, State
from tasks.submit import remove, submit
from tests.hosts.fleet import Fleet
from tests.hosts.host import REPO
from worker.runsc import find_binary
from worker.settings import load_settings
from worker.spec import Spec, make_spec
from worker.subnet import ensure_network

OUT = Path(__file__).parent / "out"
COMMAND = ("sleep", "86400")
QUIET_S = 600.0  # the longest time without any event, while something is due
LOOK_S = 2.0
SETTLE_S = 5.0  # after many launches, before single ones are timed


@dataclass
class Rows:
    """The raw rows: written at once, kept for the figures."""

    file: TextIO
    all: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, **values: Any) -> None:
        row = {"what": what, "load": round(os.getloadavg()[0], 2), **values}
        self.all.append(row)
        print(json.dumps(row), file=self.file, flush=True)


def main(
    live: Annotated[int, typer.Option(min=1, help="Sandboxes live at the most.")] = 1000,
    few: Annotated[int, typer.Option(min=1, help="Sandboxes live to compare with.")] = 10,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts on this machine.")] = 4,
    slots: Annotated[int, typer.Option(min=1, help="Launches at a time, of each host.")] = 1,
    probes: Annotated[int, typer.Option(min=1, help="Launches one by one, at each number.")] = 20,
    specs: Annotated[int, typer.Option(min=0, help="Sandboxes in the queue; 0: not measured.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the queue.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the raw rows.")] = OUT,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure many sandboxes over several hosts on this machine."""
    if os.geteuid() != 0:
        say("root is needed")
        raise typer.Exit(2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"scale-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.jsonl"
    with path.open("w") as file, tempfile.TemporaryDirectory(prefix="sandbatch-bench-") as folder:
        rows = Rows(file)
        try:
            if specs:
                _queue(Path(folder), rows, specs, rounds)
            _fleet(Path(folder), rows, Plan(live, few, hosts, slots, probes))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    document = {"live": live, "few": few, "hosts": hosts, "slots": slots, "specs": specs, "rows": str(path)}
    document |= {"runsc": _runsc_version(), **summary(rows.all)}
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console(highlight=False).print(table(document))
    say(f"rows: {path}")
    raise typer.Exit(0 if document["audit"] == 0 else 1)


# -- ten thousand in the queue -----------------------------------------------------------------------


def _queue(folder: Path, rows: Rows, specs: int, rounds: int) -> None:
    """Time the commands of a user, the start of Python and all, with a broker and no host."""
    settings = load_settings(state_dir=folder / "queue", run_dir=folder / "queue-run")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SANDBATCH_")}
    env = {**ours, "PYTHONPATH": str(REPO), "SANDBATCH_STATE_DIR": str(settings.state_dir)}
    env["SANDBATCH_RUN_DIR"] = str(settings.run_dir)
    ensure_network(settings)  # where no host tells its networks, `run` looks for them here

    def timed(what: str, *args: str) -> str:
        began, cpu = time.perf_counter(), _cpu_of_children_s()
        done = subprocess.run(
            [sys.executable, "-m", "cli", *args], env=env, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"bench: sandbatch {' '.join(args)}: {done.stderr}")
        rows.add(what, n=specs, s=round(seconds, 4), cpu_s=round(_cpu_of_children_s() - cpu, 4))
        return done.stdout

    for number in range(rounds):
        settings = settings.model_copy(update={"state_dir": folder / f"queue{number}"})
        with embedded_broker(settings) as broker:
            timed("enqueue", "run", "--count", str(specs), "--", *COMMAND)
            assert len(timed("ls", "ls").splitlines()) > specs
            timed("ls --json", "ls", "--json")
            rows.add("queue memory", n=specs, broker=sum(one.pss for one in measure(broker)))
        say(f"queue, round {number + 1} of {rounds}")


def _cpu_of_children_s() -> float:
    """CPU time of the commands so far: it says the same on a machine that others use, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- many live ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    live: int
    few: int
    hosts: int
    slots: int
    probes: int

    @property
    def capacity(self) -> int:
        return -(-self.live // self.hosts) + 2


def _fleet(folder: Path, rows: Rows, plan: Plan) -> None:
    env = {
        "SANDBATCH_SLOTS": str(plan.slots),
        "SANDBATCH_CAPACITY": str(plan.capacity),
        "SANDBATCH_RECONCILE_S": "15",  # as hosts have it; the tests' fleet is quicker
    }
    free = _available()
    with Fleet(folder / "fleet", plan.hosts, **env) as fleet:
        user = User(fleet, rows)
        say(f"{plan.hosts} hosts are up")
        user.memory(0)
        user.up(plan.few)
        user.probe(plan.few, plan.probes)
        user.up(plan.live - plan.few)
        say(f"{plan.live} are live: {fleet.live()}")
        rows.add("spread", n=plan.live, live=fleet.live())
        rows.add("machine memory", n=plan.live, used=free - _available())
        user.memory(plan.live)
        user.probe(plan.live, plan.probes)
        user.memory(plan.live)
        user.down(plan.live - plan.few)
        user.probe(plan.few, plan.probes)
        user.down(plan.few)
        found = fleet.audits()
        for line in found:
            say(f"left over: {line}")
        rows.add("audit", found=len(found))


class User:
    """Launches and removes over a fleet, and writes down how long it took."""

    def __init__(self, fleet: Fleet, rows: Rows) -> None:
        self._fleet = fleet
        self._rows = rows
        self._settings = load_settings(broker_url=f"redis+socket://:{fleet.password}@{fleet.broker_socket}")
        self._app = make_app(self._settings, "client")
        self._spec: Spec = make_spec(args=list(COMMAND))
        self._ids: list[str] = []

    def up(self, count: int) -> None:
        """Launch so many at once; all of them must run."""
        if count <= 0:
            return
        ids: list[str] = []
        seconds = self._until(ids, {State.RUNNING}, lambda: ids.extend(self._submit(count)))
        self._rows.add("up", n=count, s=round(seconds, 3))
        self._ids += ids
        say(f"{count} up in {seconds:.1f} s, {count / seconds:.2f} a second")
        time.sleep(SETTLE_S)

    def down(self, count: int) -> None:
        """Remove so many at once, until nothing of them is left."""
        if count <= 0:
            return
        ids, self._ids = self._ids[-count:], self._ids[:-count]
        seconds = self._until(list(ids), set(TERMINAL), lambda: self._remove(ids))
        self._rows.add("down", n=count, s=round(seconds, 3))
        say(f"{count} down in {seconds:.1f} s, {count / seconds:.2f} a second")
        time.sleep(SETTLE_S)

    def probe(self, live: int, count: int) -> None:
        """Launch and remove one after the other, while `live` others live."""
        for number in range(count):
            ids: list[str] = []

            def begin(ids: list[str] = ids) -> None:
                ids.extend(self._submit(1))

            up_s = self._until(ids, {State.RUNNING}, begin)
            stages = {run["name"]: run["duration_s"] for run in self._record.get_all(ids)[0]["stages"]}
            down_s = self._until(list(ids), set(TERMINAL), lambda ids=ids: self._remove(ids))  # type: ignore[misc]
            self._rows.add(
                "probe", n=live, number=number, up_s=round(up_s, 4), down_s=round(down_s, 4), stages=stages
            )
        say(f"{count} one by one, with {live} live")

    def memory(self, live: int) -> None:
        """What workers and broker have of the memory at this moment."""
        broker = sum(one.pss for one in measure(self._fleet.broker.pid, ("broker",)))
        kinds: dict[str, list[int]] = {kind: [] for kind in WORKER_KINDS}
        for host in self._fleet.hosts.values():
            assert host.worker is not None
            for one in measure(host.worker.pid, WORKER_KINDS):
                kinds[one.kind].append(one.pss)
        total = broker + sum(map(sum, kinds.values()))
        self._rows.add("memory", n=live, total=total, broker=broker, **kinds)
        say(f"workers and broker have {total / 1e6:.0f} MB with {live} live")

    @property
    def _record(self) -> Any:
        return self._fleet.record

    def _submit(self, count: int) -> list[str]:
        return submit(self._app, self._record, self._settings, [self._spec] * count)[1]

    def _remove(self, ids: Sequence[str]) -> None:
        remove(self._app, self._record, self._record.get_all(ids))

    def _until(self, ids: list[str], goal: set[State], begin: Callable[[], None]) -> float:
        """Seconds until all of `ids`, which `begin` may add to, have reached the goal."""
        mark, began = self._record.last_event(), time.perf_counter()
        begin()
        left, heard = set(ids), time.perf_counter()
        while left:
            for seen, event in self._record.follow(mark, LOOK_S):
                mark, heard = seen, time.perf_counter()
                if event["state"] in goal:
                    left.discard(event["id"])
                elif event["id"] in left and event["state"] in (*TERMINAL, State.STUCK):
                    row = self._record.get_all([event["id"]])[0]
                    raise SystemExit(f"bench: {event['id']} is {event['state']}: {row['error']}")
            if time.perf_counter() - heard > QUIET_S:
                raise SystemExit(f"bench: no news of {len(left)}\n{self._fleet.logs()}")
        return heard - began


def _runsc_version() -> str:
    binary = find_binary(load_settings())
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[0].removeprefix("runsc version ")


def _available() -> int:
    """What this machine could still give, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    program.command()(main)
    program()
