"""Why a sandbox waits, or is unknown: said of rows as `ls` and `show` have them."""

from collections.abc import Sequence
from typing import Any

from tasks.host_record import LIVE
from tasks.keys import sandbox_key
from tasks.record import Record
from tasks.room import Need, moment, need_of, why, why_queued
from tasks.sealed import readable
from tasks.state import UNKNOWN, State
from worker.limits import rough

Row = dict[str, Any]


def explain(record: Record, rows: Sequence[Row]) -> None:
    """Give each row a `why`; None where there is nothing to explain.

    The hosts are asked once, and each distinct need is judged once: thousands that wait often need the same.
    """
    hosts: dict[str, Any] | None = None
    batches: dict[str, Row | None] = {}
    needs: dict[object, Need] = {}
    answers: dict[Need, str] = {}
    pulls: dict[str, list[Row]] = {}
    for row in rows:
        row["why"] = None
        if row["state"] == State.LAUNCHING and row["stage"] == "image" and row["host"]:
            if row["host"] not in pulls:
                pulls[row["host"]] = record.pulls_on(row["host"])
            row["why"] = _pulling(record, row, pulls[row["host"]])
        if row["state"] not in (State.QUEUED, UNKNOWN):
            continue
        if hosts is None:
            hosts = record.all_hosts()
        if row["state"] == UNKNOWN:
            row["why"] = _lost(row, hosts)
        elif row["held"]:
            if row["batch"] not in batches:
                batches[row["batch"]] = record.batch(row["batch"])
            row["why"] = why_queued(row, hosts, batches[row["batch"]])
        else:
            key = (
                row["id"]
                if "spec" in row
                else tuple(row[name] for name in ("queue", "kind", "host", "memory", "nets"))
            )
            need = needs[key] = needs.get(key) or need_of(row)
            if need not in answers:
                answers[need] = why(need, hosts)
            row["why"] = answers[need]


def so_far(pull: Row) -> str:
    """`pulling busybox:1, 1.2m of 2.0m`: of a row of `Pulls.pulls_on`, or of an order."""
    phase, done, total = pull["phase"], pull["done_bytes"], pull["total_bytes"]
    words = f"{'waiting for' if phase == 'waiting' else phase} {pull['reference']}"
    if phase == "pulling" and done is not None:
        words += f", {rough(done)}" + (f" of {rough(total)}" if total else "")
    if pull["words"]:
        words += f" (try {pull['tries']}: {pull['words']})" if pull["tries"] > 1 else f" ({pull['words']})"
    return words


def _pulling(record: Record, row: Row, pulls: Sequence[Row]) -> str | None:
    """What a launch at its first stage waits for; None if its host says nothing of it (yet)."""
    mine = [one for one in pulls if row["batch"] in one["batches"]]
    if len({one["reference"] for one in mine}) > 1:
        spec = row.get("spec") or readable(str(record.client.hget(sandbox_key(row["id"]), "spec") or "{}"))
        mine = [one for one in mine if one["reference"] == spec.get("image")]
    return so_far(mine[0]) if mine else None


def _lost(row: Row, hosts: dict[str, Any]) -> str:
    facts = hosts.get(row["host"])
    if facts is None or facts["state"] == LIVE:
        return f"host {row['host']} has just returned"
    words = f"host {row['host']} is lost since {moment(facts['heartbeat_at'])}, it was {row['last_state']}"
    return f"{words}; replaced by {row['replaced_by']}" if row["replaced_by"] else words
