"""Why a sandbox waits, or is unknown: said of rows as `ls` and `show` have them."""

from collections.abc import Sequence
from typing import Any

from tasks.host_record import LIVE
from tasks.record import Record
from tasks.room import Need, moment, need_of, why, why_queued
from tasks.state import UNKNOWN, State

Row = dict[str, Any]


def explain(record: Record, rows: Sequence[Row]) -> None:
    """Give each row a `why`; None where there is nothing to explain.

    The hosts are asked once, and each distinct need is judged once: thousands that wait often need the same.
    """
    hosts: dict[str, Any] | None = None
    batches: dict[str, Row | None] = {}
    needs: dict[object, Need] = {}
    answers: dict[Need, str] = {}
    for row in rows:
        row["why"] = None
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


def _lost(row: Row, hosts: dict[str, Any]) -> str:
    facts = hosts.get(row["host"])
    if facts is None or facts["state"] == LIVE:
        return f"host {row['host']} has just returned"
    words = f"host {row['host']} is lost since {moment(facts['heartbeat_at'])}, it was {row['last_state']}"
    return f"{words}; replaced by {row['replaced_by']}" if row["replaced_by"] else words
