"""Records read lightly: what a table and a filter need of ten thousand sandboxes, and no more.

A row has names and types of a row of `tasks.view.shape`, but fewer; a spec is read only where the
record has no words for what the table shows of it.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tasks.keys import CHUNK, sandbox_key
from tasks.record import Record
from tasks.sealed import readable
from tasks.view import parsed

Row = dict[str, Any]
FIELDS = (
    *("id", "batch", "state", "stage", "host", "ip", "created_at", "exit_code", "error", "removed"),
    *("publish", "queue", "nets", "memory", "command", "held", "replaced_by", "line"),
)
STATE = FIELDS.index("state")

# ARGV: number of fields, the fields, the ids.  One call of a thousand costs a client a tenth of a thousand.
READ = """
local fields, out = {}, {}
local count = tonumber(ARGV[1])
for i = 1, count do fields[i] = ARGV[i + 1] end
for i = count + 2, #ARGV do out[#out + 1] = redis.call('HMGET', KEYS[1] .. ARGV[i], unpack(fields)) end
return out
"""


def read(record: Record, ids: Sequence[str] | None = None, *, with_labels: bool = False) -> list[Row]:
    """All sandboxes, or those of `ids`, oldest first; the index forgets records that have expired.

    `labels` are empty unless asked for: they stand in the spec.
    """
    wanted = list(ids) if ids is not None else record.ids()
    answers = list(_hmget(record, FIELDS, wanted))
    rows = [_row(fields) for fields in answers if fields[STATE]]
    if ids is None and len(rows) < len(wanted):
        gone = [one for one, fields in zip(wanted, answers, strict=True) if not fields[STATE]]
        record.forget_expired(gone)
    _fill_in(record, [row for row in rows if with_labels or row["command"] is None])
    record.mark_unknown(rows)
    return rows


def _hmget(record: Record, fields: Sequence[str], ids: Sequence[str]) -> Iterable[list[str | None]]:
    script = record.client.register_script(READ)
    for start in range(0, len(ids), CHUNK):
        yield from script(keys=[sandbox_key("")], args=[len(fields), *fields, *ids[start : start + CHUNK]])


def _row(fields: list[str | None]) -> Row:
    row: Row = dict(zip(FIELDS, fields, strict=True))
    row["stage"] = row["stage"] or None
    row["exit_code"] = parsed(row["exit_code"], int, None)
    row["error"] = parsed(row["error"], dict, None)
    row["removed"] = row["removed"] == "1"
    row["held"] = row["held"] == "1"
    line = row.pop("line")
    row["kind"] = line.split("|")[1] if line and "|" in line else None
    row["publish"] = [one for one in parsed(row["publish"], list, []) if isinstance(one, dict)]
    row["networks"] = row["nets"].split(",") if row["nets"] else []
    row["memory"] = parsed(row["memory"], int, None)
    row["labels"] = {}
    if not row["host"]:
        row["host"] = row["queue"][5:] if (row["queue"] or "").startswith("host:") else None
    return row


def _fill_in(record: Record, rows: Sequence[Row]) -> None:
    """Give rows what only their specs say."""
    specs = _hmget(record, ["spec"], [row["id"] for row in rows])
    for row, (text,) in zip(rows, specs, strict=True):
        asked = _asked(text or "{}")
        row["labels"] = asked["labels"]
        if row["command"] is None:  # of a client of the release before, or begun anew from a journal
            row |= {"command": asked["command"], "networks": asked["networks"]}
            row["host"] = row["host"] or asked["host"]


@lru_cache(maxsize=1024)  # the sandboxes of a batch often have one spec
def _asked(text: str) -> Row:
    spec = readable(text)
    return {
        "labels": spec.get("labels") or {},
        "command": " ".join(map(str, spec.get("args") or [])),
        "networks": [one["name"] for one in spec.get("networks") or []],
        "host": spec.get("host"),
    }
