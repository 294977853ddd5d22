"""A batch's report, as a file: JSON for programs, JUnit's XML for what shows tests."""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from tasks.state import TERMINAL, State
from worker.errors import BadInput, SandbatchError

ENDINGS = (".json", ".xml")
COMMAND_SHOWN = 60
# What XML 1.0 has no way to write, however it is escaped.
NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
FIELDS = (
    *("id", "state", "reason", "exit_code", "host", "created_at", "running_at", "ended_at", "error"),
    *("attempt", "restarts", "oom", "labels", "args"),
)


def check(path: Path) -> None:
    """Refuse what cannot be written, before anything is enqueued.

    Raises:
        BadInput: Its ending says nothing, or its folder is not there.
    """
    if path.suffix.lower() not in ENDINGS:
        raise BadInput(f"--report {path}", "its ending says no format", f"name it {' or '.join(ENDINGS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(f"--report {path}", "it cannot be written there", "name a file in a folder of yours")


def write(path: Path, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write the report, whole or not at all.

    Raises:
        SandbatchError: The disk says no.
    """
    text = as_xml(batch, rows) if path.suffix.lower() == ".xml" else as_json(batch, rows)
    made = ""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            made = file.name
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(made).chmod(0o666 & ~mask)  # as any other file of this user: it is for others to read
        Path(made).replace(path)
    except OSError as error:
        if made:
            Path(made).unlink(missing_ok=True)
        todo = f"sandbatch wait --batch {batch['name']} --report FILE writes it anew"
        raise SandbatchError(f"report {path}", error.strerror or str(error), todo) from None


def as_json(batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    shown = [{name: row.get(name) for name in FIELDS} for row in rows]
    return json.dumps({"batch": batch, "sandboxes": shown}, indent=1, ensure_ascii=False) + "\n"


def as_xml(batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """One suite, a case for each sandbox: a failure is its program's, an error is ours or its host's."""
    suite = ET.Element("testsuite", name=_text(batch["name"]), tests=str(len(rows)))
    counts: Counter[str] = Counter()
    for row in rows:
        case = ET.SubElement(suite, "testcase")
        words = " ".join(row["args"])[:COMMAND_SHOWN]
        case.attrib |= {"name": _text(f"{row['id']} {words}"), "classname": _text(batch["name"])}
        case.attrib["time"] = f"{_seconds(row['running_at'], row['ended_at']):.3f}"
        if verdict := _verdict(row):
            kind, about, message = verdict
            counts[kind] += 1
            told = ET.SubElement(case, kind, message=_text(message))
            if about:
                told.attrib["type"] = about
                told.text = _text(message)
        if row["host"]:
            ET.SubElement(case, "system-out").text = _text(f"host {row['host']}")
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.attrib[attribute] = str(counts[kind])
    suite.attrib["time"] = f"{_seconds(batch.get('created_at'), batch.get('ended_at')):.3f}"
    if batch.get("created_at"):
        suite.attrib["timestamp"] = batch["created_at"]
    ET.indent(suite)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(suite, encoding="unicode")}\n'


def _verdict(row: dict[str, Any]) -> tuple[str, str, str] | None:
    """The element, its type, its message; None for a success."""
    error = row["error"]
    if row["state"] == State.CANCELLED:
        return "skipped", "", "cancelled"
    if row["state"] not in TERMINAL:
        return "error", "unfinished", f"it has not ended: {row['state']}"
    if row["state"] == State.FAILED:
        return "error", error["stage"] if error else "failed", _words(error) or row["reason"] or "failed"
    if row["exit_code"] == 0 or row["reason"] in ("stop", "ttl", "rm"):  # as a batch's rule counts
        return None
    code, reason = row["exit_code"], row["reason"] or "exit"
    return "failure", reason, f"ended by {reason}" if code is None else f"exit code {code}"


def _words(error: dict[str, Any] | None) -> str:
    return f"{error['stage']}: {error['message']}" if error else ""


def _seconds(begun: str | None, ended: str | None) -> float:
    if not begun or not ended:
        return 0.0
    return max(0.0, (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds())


def _text(text: str) -> str:
    return NO_XML.sub(lambda found: ascii(found[0])[1:-1], text)
