"""Reports of batches, as files."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from cli import report
from worker.errors import BadInput, SandbatchError

BATCH = {
    "name": "nightly",
    "created_at": "2026-01-01T00:00:00.000Z",
    "ended_at": "2026-01-01T00:01:00.500Z",
    "outcome": "failed",
}


def row(container_id: str, state: str, **more: Any) -> dict[str, Any]:
    usual = {
        "id": container_id,
        "state": state,
        "reason": None,
        "exit_code": None,
        "host": "h1",
        "error": None,
    }
    usual |= {"created_at": None, "running_at": None, "ended_at": None, "args": ["sleep", "1"], "spec": {}}
    return {**usual, **more}


ERROR = {"stage": "network", "message": "no \x00\x1b[31mmoon\ud800 & <none> \ufffe"}
ROWS = [
    row(
        "sb-1",
        "exited",
        exit_code=0,
        reason="exit",
        running_at="2026-01-01T00:00:01.000Z",
        ended_at="2026-01-01T00:00:03.250Z",
    ),
    row("sb-2", "exited", exit_code=7, reason="exit"),
    row("sb-3", "exited", exit_code=143, reason="stop"),  # as the rule counts: it was asked to
    row("sb-4", "failed", error=ERROR),
    row("sb-5", "cancelled", host=None),
    row("sb-6", "running"),
    row("sb-7", "exited", reason="lost"),
]


def test_junit_has_a_case_for_each_sandbox_and_survives_any_error(tmp_path: Path):
    """A plugin's or a program's last words may have what XML cannot write."""
    report.write(tmp_path / "a.xml", BATCH, ROWS)
    suite = ET.parse(tmp_path / "a.xml").getroot()  # noqa: S314 - our own
    assert suite.tag == "testsuite"
    counts = {name: suite.attrib[name] for name in ("name", "tests", "failures", "errors", "skipped", "time")}
    assert counts == {
        "name": "nightly",
        "tests": "7",
        "failures": "2",
        "errors": "2",
        "skipped": "1",
        "time": "60.500",
    }
    cases = {case.attrib["name"].split()[0]: case for case in suite}
    assert {case.attrib["classname"] for case in suite} == {"nightly"}
    assert cases["sb-1"].attrib["time"] == "2.250"
    assert cases["sb-1"].attrib["name"] == "sb-1 sleep 1"
    told = {name: [(one.tag, one.get("message")) for one in case] for name, case in cases.items()}
    assert told["sb-1"] == told["sb-3"] == [("system-out", None)]
    assert told["sb-2"][0] == ("failure", "exit code 7")
    assert told["sb-4"][0] == ("error", r"network: no \x00\x1b[31mmoon\ud800 & <none> \ufffe")
    assert told["sb-5"] == [("skipped", "cancelled")]
    assert told["sb-6"][0] == ("error", "it has not ended: running")
    assert told["sb-7"][0] == ("failure", "ended by lost")


def test_json_has_the_batch_and_each_sandbox(tmp_path: Path):
    rows = [one for one in ROWS if one["id"] != "sb-4"]
    report.write(tmp_path / "a.json", BATCH, rows)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["batch"] == BATCH
    assert [one["id"] for one in found["sandboxes"]] == [one["id"] for one in rows]
    wanted = {"id", "state", "reason", "exit_code", "host", "created_at", "running_at", "ended_at", "error"}
    assert wanted <= set(found["sandboxes"][0])
    assert "spec" not in found["sandboxes"][0]  # its environment may hold secrets


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.json").write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SandbatchError, match="No space left"):
        report.write(tmp_path / "a.json", BATCH, ROWS[:1])
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize("name", ["a.txt", "a", "no/such/a.xml", ".", ".json"])
def test_what_cannot_be_written_is_refused_before(tmp_path: Path, name: str):
    with pytest.raises(BadInput):
        report.check(tmp_path / name)
    report.check(tmp_path / "A.XML")
