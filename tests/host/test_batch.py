"""Batches over a real host: waves, a rule that stops the rest, cancel, the report."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from tests.host.system import System


def write(system: System, text: str) -> str:
    file = system.folder / "jobs.yaml"
    file.write_text(text)
    return str(file)


def rows(system: System, batch: str) -> list[dict[str, Any]]:
    """In the order of the file, which is that of the report."""
    report = system.folder / "rows.json"
    system.cli("wait", "--batch", batch, "--timeout", "0.1", "--report", str(report), check=False)
    found: list[dict[str, Any]] = json.loads(report.read_text())["sandboxes"]
    return found


def test_waves_go_one_after_the_other_and_the_report_has_each(clean_system: System, tmp_path: Path):
    """The second wave is released once the first runs or has ended; what fails does not stop the others."""
    file = write(
        clean_system,
        "waves: [1, 2]\nsuccess: 3\nspecs:\n- command: [sh, -c, exit 7]\n- command: 'true'\n  count: 3\n",
    )
    report = tmp_path / "jobs.xml"
    done = clean_system.cli("batch", file, "--name", "waves", "--wait", "--report", str(report))
    assert done.stdout == "waves\n"
    assert "batch waves succeeded: 3 good, 1 bad of 4" in done.stderr
    suite = ET.parse(report).getroot()  # noqa: S314 - our own
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == ("4", "1", "0")
    first, *second, last = rows(clean_system, "waves")
    began = {one["id"]: one["stages"][0]["started_at"] for one in clean_system.ls().values()}
    assert first["running_at"] <= min(began[one["id"]] for one in second)
    assert max(one["running_at"] for one in second) <= began[last["id"]]


def test_a_rule_that_cannot_be_kept_stops_the_rest(clean_system: System):
    file = write(
        clean_system,
        "max_in_flight: 2\nfail_fast: true\nspecs:\n"
        "- command: [sleep, 600]\n- command: [sh, -c, exit 1]\n- command: [sleep, 600]\n  count: 8\n",
    )
    done = clean_system.cli("batch", file, "--name", "fast", "--wait", "--timeout", "60", check=False)
    assert done.returncode == 1, done.stderr
    assert "batch fast failed: 0 good, 10 bad of 10" in done.stderr
    assert {one["state"] for one in rows(clean_system, "fast")} == {"cancelled", "exited"}
    assert clean_system.audit() == []


def test_cancel_undoes_what_runs_and_drops_what_waits(clean_system: System):
    file = write(clean_system, "specs:\n- command: [sleep, 600]\n  count: 6\n")
    clean_system.cli("batch", file, "--name", "many", "--max-in-flight", "3")
    ids = [one["id"] for one in rows(clean_system, "many")]
    clean_system.cli("wait", *ids[:3], "--for", "running", "--timeout", "60")
    done = clean_system.cli("cancel", "many")
    assert sorted(done.stdout.split()) == sorted(ids)
    found = rows(clean_system, "many")
    assert {one["state"] for one in found} <= {"cancelled", "exited"}
    assert sum(one["running_at"] is not None for one in found) == 3
    assert clean_system.audit() == []
    (batch,) = (
        one for one in json.loads(clean_system.cli("batches", "--json").stdout) if one["name"] == "many"
    )
    assert (batch["outcome"], batch["ended"], batch["held"]) == ("cancelled", 6, 0)
