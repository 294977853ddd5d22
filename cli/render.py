"""Tables for people."""

import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cli import lines
from cli.output import one_line
from worker.limits import in_words

if TYPE_CHECKING:
    from rich.table import Table


def table(*columns: str) -> "Table":
    """A plain table, as `kubectl get` prints it."""
    from rich.table import Table  # slow to import, and `ls` does without it

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(
            column,
            overflow="fold" if column in ("ID", "ERROR", "MEND") else "ellipsis",
            no_wrap=column != "ERROR",
        )
    return made


def sandboxes(rows: list[dict[str, Any]]) -> str:
    """The table of `ls`, of the rows of `tasks.rows`, cut to the width of a terminal."""
    with_ports = ["PORTS"] if any(row["publish"] for row in rows) else []
    header = ("ID", "STATE", "HOST", "IP", "NETWORK", *with_ports, "AGE", "COMMAND", "WHY")
    now_s = datetime.now().timestamp()
    table = [
        (
            row["id"],
            _state(row),
            row["host"] or "-",
            row["ip"] or "-",
            ",".join(row["networks"]) or "-",
            *((ports(row["publish"]) or "-",) if with_ports else ()),
            age(row["created_at"], now_s),
            _command(row),
            _why(row),
        )
        for row in rows
    ]
    return lines.columns(header, table, os.get_terminal_size().columns if sys.stdout.isatty() else None)


def _state(row: dict[str, Any]) -> str:
    if row["state"] == "launching":
        return f"launching ({row['stage'] or '…'})"
    if row["state"] == "exited" and row["exit_code"] is not None:
        return f"exited ({row['exit_code']})"
    return str(row["state"])


def _command(row: dict[str, Any]) -> str:
    words: str = row["command"] or "-"  # an image's own, before that is here
    return words if len(words) <= 40 else words[:39] + "…"


def _why(row: dict[str, Any]) -> str:
    """Why it failed, why it waits, or what has become of it."""
    if error := row["error"]:
        return f"{error['stage']}: {error['message']}"
    if row.get("why"):
        return str(row["why"])
    return f"replaced by {row['replaced_by']}" if row["replaced_by"] else ""


def line(row: dict[str, Any]) -> str:
    """A sandbox in one line, for what is no terminal."""
    words = (row["id"], row["state"], row["host"] or "-", row["ip"] or "-", _why(row))
    return "  ".join(filter(None, words))


def hosts(rows: list[dict[str, Any]]) -> "Table":
    names = ("HOST", "STATE", "HEARTBEAT", "SANDBOXES", "LAUNCHING", "MEMORY", "LOAD")
    made = table(*names, "VERSION", "RUNSC", "LABELS", "NETWORKS", "NOTE")
    for row in rows:
        drain = row.get("drained")
        notes = ["drained" + (f": {drain['why']}" if drain["why"] else "")] if drain else []
        if row.get("foreign"):
            notes.append(f"{row['foreign']} messages of another release wait: upgrade it")
        made.add_row(
            row["name"],
            row["state"],
            age(row["heartbeat_at"]),
            f"{row['sandboxes']}/{row['capacity']}",
            f"{row.get('launching', '-')}/{row['slots']}",
            _memory(row),
            f"{row['load']:g}/{row['cpus']}" if "load" in row else "-",
            row["version"],
            row.get("runsc") or "-",
            ",".join(f"{name}={value}" for name, value in (row.get("labels") or {}).items()) or "-",
            ", ".join(row["networks"]),
            "; ".join([*notes, *filter(None, [row.get("not_ready")])]),
        )
    return made


def _memory(row: dict[str, Any]) -> str:
    """What its sandboxes ask for, of what they may have, in GiB."""
    if not row.get("memory"):
        return "-"
    asked, budget = (f"{(row.get(name) or 0) / 2**30:.1f}" for name in ("memory_asked", "memory"))
    return f"{asked}/{budget}g"


def batches(rows: list[dict[str, Any]]) -> "Table":
    numbers = ("total", "held", "starting", "running", "good", "bad")
    made = table("BATCH", "AGE", *(one.upper() for one in numbers), "OUTCOME")
    for row in rows:
        outcome = row["outcome"] or ("being cancelled" if row["cancelled"] else "-")
        made.add_row(row["name"], age(row["created_at"]), *(str(row[one]) for one in numbers), outcome)
    return made


def timeline(stages: list[dict[str, Any]]) -> "Table":
    made = table("STAGE", "DO|UNDO", "STATE", "STARTED", "SECONDS", "ERROR")
    for run in stages:
        seconds = "-" if run["duration_s"] is None else f"{run['duration_s']:.3f}"
        made.add_row(
            run["name"], run["do|undo"], run["state"], run["started_at"], seconds, run["error"] or ""
        )
    return made


def details(row: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    shown = {
        "id": row["id"],
        "state": row["state"],
        "why": row.get("why"),
        "replaces": row["replaces"],
        "replaced by": row["replaced_by"],
        "batch": row["batch"],
        "host": row["host"],
        "network": ", ".join(row["networks"]),
        "ip": ", ".join(row["ips"]) if len(row["links"]) < 2 else _links(row["links"]),
        "published": ports(row["publish"]),
        "notes": "; ".join(row["notes"]),
        "image" if row["spec"].get("image") else "rootfs": row["image"],
        "image digest": row["image_digest"],
        "image labels": one_line(", ".join(f"{name}={value}" for name, value in row["image_labels"].items())),
        "command": one_line(" ".join(row["args"])),
        "labels": ", ".join(f"{name}={value}" for name, value in row["labels"].items()),
        "limits": limits(row["limits"]),
        "ready": row["ready"],
        "egress": _egress(row["spec"]),
        "isolated": "yes" if row["spec"].get("isolate") else None,
        "created": row["created_at"],
        "running": row["running_at"],
        "ended": row["ended_at"],
        "exit code": row["exit_code"],
        "ended by": row["reason"],
        "restarts": row["restarts"] or None,
        "log kept until": row["log_until"],
        "error": f"{row['error']['stage']}: {row['error']['message']}" if row["error"] else None,
    }
    for name, value in shown.items():
        if value not in (None, ""):
            made.add_row(name, Text(str(value)))  # else rich would read marks of its own in it
    return made


def ports(published: list[dict[str, Any]]) -> str:
    """As `docker ps` has them: `8080->80/tcp`, with the address of the host where one was named."""
    found = []
    for one in published:
        ip = "" if one["host_ip"] is None else f"{one['host_ip']}:"
        ip = f"[{one['host_ip']}]:" if ip.count(":") > 1 else ip
        found.append(f"{ip}{one['host_port']}->{one['port']}/{one['protocol']}")
    return ", ".join(found)


def _links(links: list[dict[str, Any]]) -> str:
    return "; ".join(f"{one['if_name']} {', '.join(one['ips'])} ({one['network']})" for one in links)


def limits(given: dict[str, Any]) -> str:
    """`memory 512m, cpus 0.5, pids 100`: those that there are."""
    shown = {"memory": given["memory_bytes"] and in_words(given["memory_bytes"])}
    shown |= {"cpus": given["cpus"] and f"{given['cpus']:g}", "pids": given["pids"]}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value)


def _egress(spec: dict[str, Any]) -> str | None:
    rules = spec.get("egress")
    return None if rules is None else ", ".join(rules) or "deny"


def age(stamp: str | None, now_s: float | None = None) -> str:
    """How long ago, in the largest unit that fits."""
    if not stamp:
        return "-"
    now_s = datetime.now().timestamp() if now_s is None else now_s
    seconds = max(0, int(now_s - datetime.fromisoformat(stamp).timestamp()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
