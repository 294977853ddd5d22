"""monitoring/: rules that come when they should, a dashboard that asks what there is."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import lack
from worker.outcomes import RESULTS, STAGE_NAMES, VERBS

FOLDER = Path(__file__).parent.parent.parent / "monitoring"
LABEL = re.compile(r'(?P<name>\w+)(?:=~|!~|=|!=)"(?P<values>[^"]*)"')
ALLOWED = {"stage": STAGE_NAMES, "verb": VERBS, "result": RESULTS}


@pytest.fixture(scope="session")
def promtool() -> str:
    """Debian's, from its package prometheus; `make test` puts it beside the Python that runs the tests."""
    found = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))
    if found is None:
        lack("promtool is missing: make test, as root")
        raise AssertionError
    return found


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=FOLDER, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def queries() -> Iterator[str]:
    """What the dashboard asks, as Grafana fills it in."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "1h")
            yield query.replace("$host", ".*")


def test_promtool_takes_the_configuration_and_its_rules(promtool: str) -> None:
    """What the compose file's Prometheus reads; it names alerts.yml, whose job is `sandbatch`."""
    said = run(promtool, "check", "config", "prometheus.yml")
    assert "SUCCESS: 1 rule files found" in said
    [job] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "sandbatch"


def test_prometheus_takes_the_rules_and_they_come_when_they_should(promtool):
    assert f"{len(rules())} rules found" in run(promtool, "check", "rules", "alerts.yml")
    run(promtool, "test", "rules", "alerts-test.yml")


def test_each_alert_has_a_case():
    """One that never comes is worse than none."""
    tests = yaml.safe_load((FOLDER / "alerts-test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]]
    assert {case["alertname"] for case in cases} == {rule["alert"] for rule in rules()}


def test_prometheus_can_read_what_the_dashboard_asks(promtool, tmp_path):
    """As rules that record, since promtool reads no dashboard."""
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in run(promtool, "check", "rules", str(file))


def test_no_query_waits_for_a_label_that_never_comes():
    """A stage that was renamed would make a panel silent, and an alert."""
    asked = [*queries(), *(rule["expr"] for rule in rules())]
    for match in (match for query in asked for match in LABEL.finditer(query)):
        allowed = ALLOWED.get(match["name"])
        for value in match["values"].split("|") if allowed else ():
            assert value in (allowed or ()), match[0]


def test_the_dashboard_names_host_stage_and_result_first():
    """In one minute an operator sees which stage fails on which host; a panel's words say how to go on."""
    first = next(one for one in dashboard()["panels"] if one["type"] == "table")
    assert "by (host, stage, verb, result)" in first["targets"][0]["expr"]
    assert "sandbatch show ID" in first["description"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def test_no_panel_lies_over_another():
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
