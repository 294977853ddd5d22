"""The scenario that many hosts are judged by: `make fleet-judge`, or `python -m tests.hosts.judged`.

A batch over all hosts, more than they can have at a time; in the middle of it one host loses its
power, another its cable for so long that it is lost, a third is drained; later all three come back. Then
every sandbox must have ended as it should, no host may have had more than its capacity at any moment, by
the record and by the processes that lived, and audits are clean.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.host_record import HOST_LOST_S
from tasks.state import TERMINAL
from tests.host.system import SERVER
from tests.hosts.fleet import Fleet
from worker.spec import make_spec

KILLED, CUT, DRAINED = "h1", "h2", "h3"
LOST_S = HOST_LOST_S + 2.0
SAMPLE_S = 0.5  # between two looks at the processes of all hosts, each a walk through /proc
SERVING = {"args": list(SERVER[5:]), "cwd": SERVER[1], "ready": SERVER[3], "ttl_s": 8.0}
# kind -> its share of the batch, what it runs, and (state, exit code, reason) of its end
KINDS: dict[str, tuple[float, dict[str, Any], tuple[str, int | None, str]]] = {
    "serving": (0.3, SERVING, ("exited", None, "ttl")),
    "failing": (0.2, {"args": ["sh", "-c", "exit 3"]}, ("exited", 3, "exit")),
    "short": (0.5, {"args": ["sh", "-c", "sleep 1"]}, ("exited", 0, "exit")),
}


@dataclass
class Verdict:
    """What was seen. `findings` is empty where all is as it should be."""

    findings: list[str] = field(default_factory=list)
    placed: Counter[str] = field(default_factory=Counter)  # host -> sandboxes that it took
    peaks: Counter[str] = field(default_factory=Counter)  # host -> most of them at a time, by the record
    living: Counter[str] = field(default_factory=Counter)  # host -> most that were seen, by processes
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        hosts = [
            f"{name}: {self.placed[name]} taken, at most {self.peaks[name]}, {self.living[name]} seen"
            for name in sorted(self.placed)
        ]
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        return "\n".join([*hosts, f"ends: {ends}", f"{self.seconds:.1f} s", *self.findings])


def run_scenario(fleet: Fleet, sandboxes: int, tell: Callable[[str], None] = print) -> Verdict:
    """Carry it out on a fleet that is up, of which the workers had SANDBATCH_CAPACITY."""
    began, verdict = time.monotonic(), Verdict()
    kinds = enqueue(fleet, sandboxes)
    watch = _Watch(fleet, set(kinds), verdict.living, tell)
    watch.until_ended(len(kinds) // 8)
    fleet.kill(KILLED)
    fleet.cut(CUT)
    away_s = time.monotonic()
    tell(f"{KILLED} has no power, {CUT} no cable")
    fleet.drain(DRAINED)
    drained_at = fleet.record.last_event()
    tell(f"{DRAINED} is drained")
    watch.until_ended(len(kinds) // 2)
    took = [one for one in fleet.events(drained_at) if (one["state"], one["host"]) == ("placed", DRAINED)]
    verdict.findings += [f"{DRAINED} took {one['id']} while it was drained" for one in took]
    fleet.resume(DRAINED)
    tell(f"{DRAINED} is resumed")
    watch.until(away_s + LOST_S)
    verdict.findings += _look_at_lost(fleet)
    fleet.join(CUT)
    fleet.boot(KILLED)
    tell("both are back")
    watch.until_ended(len(kinds))
    verdict.seconds = time.monotonic() - began
    _look(fleet, kinds, verdict)
    return verdict


def enqueue(fleet: Fleet, sandboxes: int) -> dict[str, str]:
    """Enqueue the batch, its kinds well mixed; the kind of each id."""
    kinds = [kind for kind, (share, _, _) in KINDS.items() for _ in range(round(sandboxes * share))]
    random.Random(6).shuffle(kinds)  # noqa: S311 - the same mixture each time
    specs = [make_spec(**KINDS[kind][1], labels={"kind": kind}) for kind in kinds]
    return dict(zip(fleet.submit(specs), kinds, strict=True))


class _Watch:
    """Follows the ends of the batch, event by event."""

    def __init__(
        self, fleet: Fleet, ids: set[str], living: Counter[str], tell: Callable[[str], None]
    ) -> None:
        self.fleet, self.ids, self.living, self.tell = fleet, ids, living, tell
        self.ended: set[str] = set()
        self._last = "0-0"
        self._sampled_s = 0.0

    def until_ended(self, count: int, timeout_s: float = 240.0) -> None:
        """Until so many have ended."""
        deadline = time.monotonic() + timeout_s
        while len(self.ended) < count:
            assert time.monotonic() < deadline, f"{len(self.ended)} of {count} ended\n{self.fleet.logs()}"
            self._read(3.0)
        self._say()

    def until(self, deadline: float) -> None:
        """Until this time."""
        while (left_s := deadline - time.monotonic()) > 0:
            self._read(min(left_s, 3.0))
        self._say()

    def _read(self, block_s: float) -> None:
        for mark, event in self.fleet.record.follow(self._last, block_s):
            self._last = mark
            if event["state"] in TERMINAL and event["id"] in self.ids:
                self.ended.add(event["id"])
        if time.monotonic() - self._sampled_s > SAMPLE_S:
            self.living |= self.fleet.live()  # the greater of both
            self._sampled_s = time.monotonic()

    def _say(self) -> None:
        self.tell(f"{len(self.ended)} of {len(self.ids)} have ended")


def _look_at_lost(fleet: Fleet) -> list[str]:
    """Both that are away are lost, and nothing is claimed of what they had."""
    states = {name: facts["state"] for name, facts in fleet.record.all_hosts().items()}
    found = [f"{name} is {states[name]}, not lost" for name in (KILLED, CUT) if states[name] != "lost"]
    known = {"queued", "unknown", *TERMINAL}
    away = [row for row in fleet.rows().values() if row["host"] in (KILLED, CUT)]
    return found + [
        f"{row['id']} on {row['host']}: {row['state']}" for row in away if row["state"] not in known
    ]


def peaks(events: Iterable[dict[str, str]]) -> Counter[str]:
    """The most sandboxes that each host had at a time: from when it took one until that had ended."""
    has: dict[str, set[str]] = defaultdict(set)
    most: Counter[str] = Counter()
    for event in events:
        host, container_id = event["host"], event["id"]
        if event["state"] == "placed":
            has[host].add(container_id)
            most[host] = max(most[host], len(has[host]))
        elif event["state"] in TERMINAL:
            has[host].discard(container_id)
    return most


def _look(fleet: Fleet, kinds: dict[str, str], verdict: Verdict) -> None:
    events, rows = [one for one in fleet.events() if one["id"]], fleet.rows()  # not those of the batch
    verdict.peaks = peaks(events)
    verdict.placed = Counter(one["host"] for one in events if one["state"] == "placed")
    capacity = int(fleet.env["SANDBATCH_CAPACITY"])
    found = verdict.findings
    for how, most in (("in the record", verdict.peaks), ("alive", verdict.living)):
        found += [
            f"{host} had {count} of {capacity} {how}" for host, count in most.items() if count > capacity
        ]
    found += [f"{one} was printed and has no record" for one in kinds if one not in rows]
    for container_id, kind in kinds.items():
        row = rows.get(container_id)
        if row is not None:
            verdict.ends[_end(row)] += 1
            found += _judge(row, kind)
    found += _count(fleet, [rows[one] for one in kinds if one in rows])
    ends = Counter(one["id"] for one in events if one["state"] in TERMINAL)
    found += [f"{one} ended {count} times" for one, count in ends.items() if count > 1]
    found += [
        f"{one.name} has journals of {one.journals()}" for one in fleet.hosts.values() if one.journals()
    ]
    found += [f"{name} has {count} living sandboxes" for name, count in fleet.live().items() if count]
    found += [f"audit: {line}" for line in fleet.audits()]


def _judge(row: dict[str, Any], kind: str) -> list[str]:
    state, code, reason = KINDS[kind][2]
    is_right = (row["state"], row["reason"]) == (state, reason) and code in (None, row["exit_code"])
    died = row["host"] == KILLED and row["state"] == "failed"
    if is_right or (died and row["error"]["message"] == "host rebooted"):
        return []
    return [f"{row['id']} on {row['host']}, {kind}: {_end(row)}: {row['error']}"]


def _count(fleet: Fleet, rows: list[dict[str, Any]]) -> list[str]:
    """The batch has counted what its sandboxes say."""
    batch = fleet.record.batch(rows[0]["batch"]) or {}
    counts = {name: batch.get(name) for name in ("total", "ended", "good", "bad")}
    good = sum(row["state"] == "exited" and (row["exit_code"] == 0 or row["reason"] == "ttl") for row in rows)
    expected = {"total": len(rows), "ended": len(rows), "good": good, "bad": len(rows) - good}
    return [f"the batch counts {counts}, its sandboxes {expected}"] if counts != expected else []


def _end(row: dict[str, Any]) -> str:
    return f"{row['state']} ({row['reason'] or '-'}, {row['exit_code']})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.judged", description=__doc__)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--sandboxes", type=int, default=400)
    parser.add_argument("--capacity", type=int, default=6, help="of each host")
    given = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="sandbatch-judged-")), time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} {text}", flush=True)

    try:
        with Fleet(folder / "fleet", given.hosts, SANDBATCH_CAPACITY=str(given.capacity)) as fleet:
            tell(f"{given.hosts} hosts are up, runsc {os.environ.get('SANDBATCH_RUNSC') or 'of the PATH'}")
            verdict = run_scenario(fleet, given.sandboxes, tell)
    finally:
        shutil.rmtree(folder)
    print(verdict.table())
    return 1 if verdict.findings else 0


if __name__ == "__main__":
    sys.exit(main())
