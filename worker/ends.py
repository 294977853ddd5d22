"""How a sandbox ends: by itself, asked to, at its time; and whether it is started anew.

A wish to stop is a fact in the journal (`stop`: since when, how long the grace, why), so that whoever
keeps the sandboxes of this host next goes on with it. `worker.keeper` has the clock.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from worker import conmon, limits, procs
from worker.errors import RunscError
from worker.journal import Journal, now, seconds, stamp
from worker.launch import want_end
from worker.settings import Settings
from worker.spec import OF_IMAGE
from worker.stages import Host, cgroup_of

log = logging.getLogger("sandbatch")

FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 60.0
LONG_RUN_S = 60.0  # who ran so long begins with the shortest backoff again
SHOWN_LINES = 5
KILLED_S = 5.0  # a killed sandbox and its conmon are gone within this time


@dataclass(frozen=True)
class Due:
    """What the clock has for a sandbox: `act` is "term", "kill", "restart", "ttl" or "deadline".

    "term" is its stop signal, whichever that is.
    """

    at_s: float  # since the epoch
    act: str


def next_due(known: Journal, *, was_asked: bool) -> Due | None:
    """What is to be done with a sandbox next, and when; None if its end is under way, or nothing is.

    `was_asked`: this process has sent it TERM. One that the process before may have sent goes again.
    """
    if known.is_unwinding or known.final:
        return None
    if known.facts.get("restart_at"):
        return Due(seconds(known.facts["restart_at"]), "restart")
    stop = known.facts.get("stop")
    if stop and known.is_up:
        since_s = seconds(stop["at"])
        return Due(since_s + stop["grace_s"], "kill") if was_asked else Due(since_s, "term")
    times = []
    if known.spec.ttl_s is not None and known.facts.get("running_at") and known.is_up:
        times.append(Due(seconds(known.facts["running_at"]) + known.spec.ttl_s, "ttl"))
    if known.spec.deadline_at is not None and not stop:
        times.append(Due(seconds(known.spec.deadline_at), "deadline"))
    return min(times, key=lambda due: due.at_s, default=None)


def ask_to_stop(known: Journal, reason: str, grace_s: float) -> bool:
    """Note the wish to stop a sandbox that is up; a wish that is there already is not made later.

    Returns:
        False if nothing was noted: the one that is there ends it sooner.
    """
    stop = known.facts.get("stop")
    if stop and seconds(stop["at"]) + stop["grace_s"] <= time.time() + grace_s:
        return False
    wish = {"at": now(), "grace_s": grace_s, "reason": stop["reason"] if stop else reason}
    known.set_facts(stop=wish)
    return True


def end_unstarted(known: Journal, reason: str) -> None:
    """Turn a sandbox that runs no program, a launch or one between two runs, towards its end."""
    if reason == "deadline":
        want_end(known, "failed", _deadline_error(known, known.begun[-1] if known.begun else "place"))
    else:
        want_end(known, "exited" if known.facts.get("running_at") else "cancelled")
    known.set_facts(reason=reason)


def send_term(host: Host, known: Journal) -> None:
    """Ask the program to end, by the signal that it wants for it."""
    signal = known.spec.stop_signal or "TERM"
    try:
        host.runsc.kill(known.container_id, signal)
    except RunscError as error:  # it has just ended; if not, KILL follows
        log.info("%s was not taken: %s", signal, error, extra={"sandbox": known.container_id})


def send_kill(host: Host, container_id: str) -> None:
    """End the sandbox, whatever it does; conmon then writes its exit code."""
    found = [one for one in procs.processes_of(host.runsc.root, container_id) if one.role == "sandbox"]
    procs.end(found, KILLED_S)


def note_end(settings: Settings, known: Journal, *, is_alive: bool) -> bool:
    """Note that a sandbox's program has ended, and decide what follows: `wanted`, or `restart_at`.

    `is_alive`: its processes are there; what matters is conmon's exit file, if there is one.

    Returns:
        False if it has not ended, or its end is known.
    """
    code = conmon.exit_code(settings.exit_dir, known.container_id)
    if not known.is_up or (code is None and is_alive):
        return False
    oom = limits.was_oom_killed(cgroup_of(known))
    facts: dict[str, Any] = {"ended_at": _ended_at(settings, known), "exit_code": code, "oom": oom}
    if code is not None and not known.is_done("ready") and known.spec.ready == "none":
        # It was faster than the report that it runs.
        known.mark_done("ready", {"probe": "no probe asked for"})
    if known.is_done("ready"):  # noted a moment late, it may seem to have begun after its end
        facts["running_at"] = min(known.facts.get("running_at", facts["ended_at"]), facts["ended_at"])
    stop = known.facts.get("stop")
    if stop is not None:
        facts["reason"] = stop["reason"]
    unready = "" if known.is_done("ready") else _unready(known, code, oom)
    if stop is None and code != 0 and _may_restart(known):
        facts |= _restart(known)
    else:
        facts |= _final(known, code, stop["reason"] if stop else "", oom, unready)
    if unready and "ready" in known.begun:
        known.mark_failed("ready", unready)
    known.set_facts(**facts)
    return True


def _final(known: Journal, code: int | None, reason: str, oom: bool, unready: str) -> dict[str, Any]:
    """`unready`: how it ended before it was ready; empty for one that was."""
    if reason == "deadline":
        return {"wanted": "failed", "error": _deadline_error(known, "container")}
    if reason:
        return {"wanted": "exited"}
    is_oom = oom and code != 0  # the runsc of 2024 may lose one process to it, and go on
    reason = "oom" if is_oom else "lost" if code is None else "exit"
    if unready:
        error = {"stage": "ready", "message": unready}
    elif is_oom:
        error = _error(limits.oom_words(known.spec))
    elif code is None:
        error = _error("the sandbox was killed from outside")
    else:
        return {"wanted": "exited", "reason": reason}
    return {"wanted": "failed", "error": error, "reason": reason}


def _unready(known: Journal, code: int | None, oom: bool) -> str:
    if oom and code != 0:
        return f"{limits.oom_words(known.spec)}, before it was ready"
    how = "was killed from outside" if code is None else f"ended with exit code {code}"
    return f"it {how} before it was ready{probe_source(known)}{last_words(known)}"


def probe_source(known: Journal) -> str:
    """Whence the probe is, to be put behind its failure; empty where somebody asked for it."""
    if known.asked.ready != OF_IMAGE or known.spec.ready == "none":
        return ""
    return " (a port that the image exposes; --ready none asks for none)"


def last_words(known: Journal) -> str:
    """What the sandbox wrote last, to be put behind what went wrong: the best hint at why."""
    words = conmon.tail_log(known.log_path, SHOWN_LINES).strip()
    return f"; its last words: {words}" if words else "; it wrote nothing"


def _error(message: str) -> dict[str, str]:
    return {"stage": "container", "message": message}


def _deadline_error(known: Journal, stage: str) -> dict[str, str]:
    return {"stage": stage, "message": f"its deadline, {known.spec.deadline_at}, has passed"}


def _may_restart(known: Journal) -> bool:
    most = known.spec.max_restarts
    return most is None or known.facts.get("restarts", 0) < most


def _restart(known: Journal) -> dict[str, Any]:
    restarts = known.facts.get("restarts", 0)
    begun = [run.started_at for run in known.runs if run.name == "container" and run.verb == "do"][-1]
    quick = known.facts.get("quick_ends", 0) if time.time() - seconds(begun) < LONG_RUN_S else 0
    pause_s = min(FIRST_BACKOFF_S * 2 ** min(quick, 16), LAST_BACKOFF_S)
    return {
        "restarts": restarts + 1,
        "quick_ends": quick + 1,
        "restart_at": stamp(time.time() + pause_s),
    }


def _ended_at(settings: Settings, known: Journal) -> str:
    """When conmon wrote the exit code; now, where it did not."""
    try:
        return stamp((settings.exit_dir / known.container_id).stat().st_mtime)
    except FileNotFoundError:
        return now()
