"""Carry a round out: start a worker, ask things of it, and see it die."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.storm.plan import Act, Round
from tests.storm.system import StormSystem, kill, parent_of
from worker import procs

FAULT_S = 4.0  # a fault that nobody has passed by then: the worker is killed at that moment
START_S = 25.0
UP_ENDS_S = 45.0  # a stage under way is waited for (cli.up.STOP_S), also one that hangs
GONE_S = 15.0  # a killed worker's processes, those of its plugins and of runsc's verbs


@dataclass
class Tally:
    """What was done, for the table, and what every id was told to its user."""

    tried: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    ids: dict[str, str] = field(default_factory=dict)  # id -> kind, of every sandbox ever enqueued
    left_over: int = 0
    lost: int = 0
    doubled: int = 0
    findings: list[str] = field(default_factory=list)


def carry_out(system: StormSystem, one: Round, tally: Tally) -> None:
    """One life of a worker; when this returns it is dead, and so is whatever must die with it."""
    began = system.spawn(one.faults)
    for rule in filter(None, one.faults.split(",")):
        tally.tried[f"fault {rule.split(':')[1]}"] += 1
    if one.blow == "early":
        time.sleep(one.after_s)  # while it starts: at its imports, its reconcile, its first messages
    else:
        _wait(lambda: _is_settled(system, began), START_S)
        for act in one.acts:
            _act(system, act, tally)
        if one.blow == "fault":
            _wait(lambda: system.live_worker() is None, FAULT_S)
        else:
            time.sleep(one.after_s)
    strike(system, one, tally)
    tally.kills += 1
    _look_for_survivors(system, one, tally)


def _is_settled(system: StormSystem, began: float) -> bool:
    """It works, or it has died of its faults already."""
    assert system.process is not None
    return system.process.poll() is not None or system.has_heartbeat_since(began)


def strike(system: StormSystem, one: Round, tally: Tally) -> None:
    """The blow that ends the round."""
    worker, is_dead = system.live_worker(), system.process is None or system.process.poll() is not None
    blow = one.blow
    if blow == "fault":
        blow = "kill at a fault point" if worker is None else "worker"
    tally.tried[{"worker": "kill the worker", "early": "kill a starting worker"}.get(blow, f"kill {blow}"
                if not blow.startswith("kill") else blow)] += 1  # fmt: skip
    if one.blow == "broker" and not is_dead:
        _kill_broker(system, one, tally)
    elif one.blow == "tini" and worker is not None:
        kill(parent_of(worker.pid))
        _wait(lambda: procs.start_time(worker.pid) != worker.start_time, GONE_S)
    elif one.blow == "up" and system.process is not None:
        kill(system.process.pid)
    system.kill_all()


def _kill_broker(system: StormSystem, one: Round, tally: Tally) -> None:
    """In mode "up" the broker belongs to `up`, which ends with it; else it comes back by itself."""
    pid = system.broker_pid()
    if pid is None:
        return
    kill(pid)
    if system.broker is None:
        if not _wait(lambda: system.process is None or system.process.poll() is not None, UP_ENDS_S):
            tally.findings.append(f"round {one.number}: up goes on without its broker")
        return
    system.broker.stop()
    time.sleep(one.away_s)
    system.start_broker()
    time.sleep(one.after_s)


def _act(system: StormSystem, act: Act, tally: Tally) -> None:
    if act.verb == "launch":
        ids = system.launch(act.what, act.number)
        tally.tried[f"launch {act.what}" if ids is not None else "launch refused: no broker"] += 1
        tally.ids |= dict.fromkeys(ids or (), act.what)
    elif act.verb == "remove":
        rows = [row for row in system.rows().values() if not row["removed"] and row["state"] != "failed"]
        if rows and system.remove_sandbox(rows[act.number % len(rows)]):
            tally.tried["remove"] += 1
    elif act.verb == "stop":
        rows = [row for row in system.rows().values() if row["state"] in ("placed", "launching", "running")]
        if rows and system.stop_sandbox(rows[act.number % len(rows)]):
            tally.tried["stop"] += 1
    elif act.verb == "kill":
        found = [
            one for one in procs.all_sandbox_processes(system.settings.runsc_root) if one.role == act.what
        ]
        if found:
            procs.end([found[act.number % len(found)]], timeout_s=0)
            tally.tried[f"kill {act.what}"] += 1
    elif act.verb == "plugin":
        system.misbehave(*act.what.split())
        tally.tried[f"plugin {act.what.split()[-1]}"] += 1
    else:
        system.heal()


def _look_for_survivors(system: StormSystem, one: Round, tally: Tally) -> None:
    """What works for a dead worker would work on: all but the sandboxes with their conmon must be gone."""
    if not _wait(lambda: not _survivors(system), GONE_S):
        tally.findings.append(f"round {one.number}: outlive their worker: {_survivors(system)}")
    sentries = [
        one for one in procs.all_sandbox_processes(system.settings.runsc_root) if one.role == "sandbox"
    ]
    pids = {sentry.pid for sentry in sentries}
    owners = Counter(one.container_id for one in sentries if _parent(one.pid) not in pids)
    for container_id, count in owners.items():
        if count > 1:
            tally.findings.append(f"round {one.number}: doubled: {container_id} has {count} sandboxes")


def _survivors(system: StormSystem) -> list[str]:
    """Processes with the worker's environment that are no sandbox's and no broker."""
    mark, found = f"SANDBATCH_RUN_DIR={system.run_dir}".encode(), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environ = file.read()
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read()
        except OSError:
            continue
        if mark in environ.split(b"\0") and words and b"valkey" not in words.split(b"\0")[0]:
            found.append(f"{name} {words.replace(bytes(1), b' ').decode(errors='replace')[:150]}")
    return found


def _parent(pid: int) -> int:
    try:
        return parent_of(pid)
    except OSError:
        return 0


def _wait(is_true: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
