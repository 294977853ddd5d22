"""After a part of the storm: a clean worker, some time, and then nothing may be left, lost or doubled."""

import contextlib
import re
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import redis

from tasks.keys import EVENTS
from tests.host.machine import difference, snapshot
from tests.storm.system import CROWD, StormSystem
from worker import procs

SETTLE_S = 90.0
TERMINAL = ("exited", "failed", "cancelled")
CODES = {"short": {3, 137}, "failing": {5, 137}}  # 137: a blow of the storm's own ended it
CONTAINER_ID = re.compile(r"sb-[0-9a-f]{16}")


@dataclass
class Verdict:
    """What was found, by kind; all lists are empty when the promise was kept."""

    left_over: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    settle_s: float = 0.0

    @property
    def findings(self) -> list[str]:
        kinds = (("left over", self.left_over), ("lost", self.lost), ("doubled", self.doubled))
        return [f"{kind}: {one}" for kind, found in kinds for one in found]


def judge(system: StormSystem, ids: dict[str, str], before: dict[str, list[str]]) -> Verdict:
    """Heal, start a clean worker, wait; look; remove everything; look again. `ids`: every id printed."""
    verdict = Verdict()
    system.heal()
    began = system.spawn_calm()
    rows = _settled(system)
    verdict.lost += [f"{one} is running and has no processes" for one in _ghosts(system, rows)]
    verdict.lost += [_words(row) for row in _under_way(rows)]
    verdict.settle_s = round(time.time() - began, 1)
    _look(system, rows, ids, verdict)
    if not verdict.findings:
        _remove_all(system, before, verdict)
    return verdict


def _settled(system: StormSystem) -> dict[str, dict[str, Any]]:
    """The records once nothing is under way any more; or as they are when the time is up."""
    began = time.monotonic()
    while True:
        rows, waited_s = system.rows(), time.monotonic() - began
        is_done = not _under_way(rows) and not _ghosts(system, rows) and not _unforgotten(system, rows)
        if is_done or waited_s > SETTLE_S:
            return rows
        time.sleep(0.3)


def _under_way(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = [one for one in rows.values() if one["state"] not in (*TERMINAL, "running")]
    crowd = [one for one in rows.values() if one["network"] == "crowd" and one["state"] == "running"]
    if len(crowd) >= CROWD:  # the others wait, rightly, until one of these ends
        found = [one for one in found if (one["network"], one["state"]) != ("crowd", "queued")]
    return found


def _unforgotten(system: StormSystem, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Sandboxes that have ended as their record says, with a journal: it goes a moment after the report."""
    return [
        one for one, row in rows.items() if row["state"] in TERMINAL and (system.sandboxes / one).exists()
    ]


def _words(row: dict[str, Any]) -> str:
    where = f"{row['state']} at {row['stage']}, attempt {row['attempt']}, removed {row['removed']}"
    return f"{row['id']} is still {where}: {row['error']}"


def _ghosts(system: StormSystem, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Sandboxes that are running as their record says, and have no processes."""
    roles = _roles(system)
    return [
        one
        for one, row in rows.items()
        if row["state"] == "running" and not {"conmon", "sandbox"} <= set(roles.get(one, ()))
    ]


def _look(
    system: StormSystem, rows: dict[str, dict[str, Any]], ids: dict[str, str], verdict: Verdict
) -> None:
    for container_id in ids:
        if container_id not in rows:
            verdict.lost.append(f"{container_id} was printed and has no record")
    verdict.left_over += [f"journal of {one}, which has ended" for one in _unforgotten(system, rows)]
    roles, leases, answering = _roles(system), _leases(system), 0
    for container_id, row in rows.items():
        if row["state"] == "failed" and not row["error"]:
            verdict.lost.append(f"{container_id} failed and does not say why")
        codes = CODES.get(row["labels"].get("storm", ""))
        if codes and (row["state"], row["reason"]) == ("exited", "exit") and row["exit_code"] not in codes:
            verdict.lost.append(f"{container_id} exited with {row['exit_code']}")
        if row["state"] == "running":
            if row["spec"]["ready"].startswith("http") and not _answers(row["ip"]):
                verdict.lost.append(f"{container_id} is running and does not answer at {row['ip']}")
            counts = Counter(roles.get(container_id, ()))
            if counts["conmon"] != 1 or leases[container_id] != 1:
                verdict.doubled.append(f"{container_id} has {dict(counts)} and {leases[container_id]} leases")
            answering += 1
    addresses = Counter(row["ip"] for row in rows.values() if row["state"] == "running")
    verdict.doubled += [f"address {ip} of {count} sandboxes" for ip, count in addresses.items() if count > 1]
    verdict.doubled += _events_twice(system, rows)
    verdict.left_over += [f"audit: {line}" for line in system.audit()]
    if (given := system.look_at_given()) != system.given_before:
        verdict.left_over.append(f"a sandbox has changed what it was given: {given}")


def _remove_all(system: StormSystem, before: dict[str, list[str]], verdict: Verdict) -> None:
    system.cli("rm", "--all", check=False, timeout_s=300)
    _settled(system)
    verdict.left_over += [f"audit after rm: {line}" for line in system.audit()]
    rows = system.rows()
    verdict.lost += [
        f"{one} is {row['state']} after rm" for one, row in rows.items() if row["state"] not in TERMINAL
    ]
    journals = [path.name for path in system.sandboxes.iterdir()]
    verdict.left_over += [f"folder {name} after rm" for name in journals]
    now = snapshot()
    for kind, lines in difference(before, now).items():
        if kind == "processes":  # another system's come and go beside a storm
            lines = [line for line in lines if str(system.folder) in line]
        verdict.left_over += [f"{kind} {line}" for line in lines]
    cache = [str(path) for path in (system.folder / "cni").rglob("*") if path.is_file()]
    verdict.left_over += [path for path in cache if CONTAINER_ID.search(path)]
    verdict.left_over += [f"lease of {one}" for one in _leases(system)]


def _roles(system: StormSystem) -> dict[str, list[str]]:
    """Roles of the processes of each sandbox; of a sentry's own children only the sentry counts."""
    found: dict[str, list[str]] = {}
    for one in procs.all_sandbox_processes(system.settings.runsc_root):
        found.setdefault(one.container_id, []).append(one.role)
    return found


def _leases(system: StormSystem) -> Counter[str]:
    files = [path for path in (system.folder / "cni" / "networks").glob("*/*") if path.name[0].isdigit()]
    return Counter(path.read_text().split()[0] if path.read_text().strip() else "nobody" for path in files)


def _answers(address: str) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://{address}:8000/", timeout=10) as answer,
    ):
        return bool(answer.status == 200)
    return False


def _events_twice(system: StormSystem, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Each sandbox begins to run at most once, but for those that are started anew, and ends once."""
    with system.client() as client:
        assert client is not None
        with contextlib.suppress(redis.RedisError):
            told = [fields for _, fields in client.record.client.xrange(EVENTS)]
    events = [one for one in told if one["id"]]  # the others are of batches
    seen = Counter((one["id"], one["state"]) for one in events if one["state"] in ("running", *TERMINAL))
    again = {one for one, row in rows.items() if row["spec"]["restart"] != "no"}
    twice = [
        f"{one} became {state} {count} times"
        for (one, state), count in seen.items()
        if count > 1 and not (one in again and state == "running")
    ]
    ends = Counter(one["id"] for one in events if one["state"] in TERMINAL)
    return twice + [f"{one} ended {count} times" for one, count in ends.items() if count > 1]
