"""What a whole noisy life logs: which stage of which sandbox failed and why, and not one secret."""

import json
import re

import pytest

from tests.host.system import System

LINE = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) host=test[^:]*: ")
UP = "host test is up; Ctrl-C stops it, sandboxes go on"
PLANTED = "planted"  # part of each secret


def noisy_life(system: System) -> dict[str, str]:
    """A sandbox that ends well and one for each way to fail, all with secrets that somebody could echo."""
    secret = ("--env", "TOKEN=planted-token", "--env", "MANY=planted-first\nplanted-last")
    system.network("broken", chain=("faulty",))
    system.faulty_plugin("ADD exit1")
    ids = {}
    for name, args in {
        "good": ("--", "sh", "-c", "echo $TOKEN; sleep 100"),
        "program": ("--env", "PATH=/planted/bin:/planted/sbin", "--", "nosuchprogram"),
        "network": ("--network", "broken", "--", "true"),
        "ready": ("--ready", "tcp:9", "--ready-timeout", "0.3", "--", "sleep", "100"),
        "cwd": ("--cwd", "/nowhere", "--", "true"),
    }.items():
        done = system.cli("run", *secret, *args, check=False)
        ids[name] = done.stdout.strip()
    ids = {name: one for name, one in ids.items() if one}
    states = system.wait([one for name, one in ids.items() if name != "good"], "terminal")
    assert set(states.values()) == {"failed"}
    system.wait([ids["good"]], "running")
    system.cli("exec", "--env", "MORE=planted-more", ids["good"], "--", "nosuchprogram", check=False)
    system.cli("exec", "--env", "MORE=planted-more", ids["good"], "--", "sh", "-c", "echo $MORE")
    system.cli("rm", "--all")
    return ids


def whole_log(system: System) -> str:
    return (system.folder / "up.log").read_text()


@pytest.mark.parametrize("form", ["line", "json"])
def test_a_noisy_life_tells_what_failed_and_no_secret(make_system, form):
    system = make_system(SANDBATCH_LOG_FORMAT=form, SANDBATCH_LOG_LEVEL="debug")
    system.start()
    ids = noisy_life(system)
    shown = system.cli("show", ids["program"], "--json").stdout
    system.stop()

    text = whole_log(system)
    assert PLANTED not in text
    assert PLANTED not in json.dumps(json.loads(shown)["error"])
    assert "Traceback" not in text
    lines = text.splitlines()
    if form == "json":
        events = [json.loads(one) for one in lines]
        errors = {one["sandbox"]: one for one in events if one["level"] == "ERROR"}
        assert errors[ids["network"]]["stage"] == "network"
        assert errors[ids["network"]]["batch"].startswith("b-")
        assert errors[ids["network"]]["attempt"] == 1
        assert "no such moon; it is made of cheese" in errors[ids["network"]]["message"]
    else:
        # One line is for the person who has started it.
        assert [one for one in lines if not LINE.match(one)] == [UP]
        errors = {ids[name]: one for name in ids for one in lines if " ERROR " in one and ids[name] in one}
        assert 'error finding executable "nosuchprogram" in PATH [***]' in errors[ids["program"]]
    of_each = {name: [one for one in lines if ids[name] in one and "ERROR" in one] for name in ids}
    assert {name: len(found) for name, found in of_each.items()} == {
        name: 0 if name == "good" else 1 for name in ids
    }


def test_what_cannot_start_says_so_in_json_too(make_system):
    """Nobody who reads JSON must meet a line that is none."""
    system = make_system(SANDBATCH_LOG_FORMAT="json", SANDBATCH_RUNSC="/nowhere/runsc")
    done = system.cli("up", check=False)
    assert done.returncode == 1
    (only,) = [json.loads(one) for one in done.stderr.splitlines()]
    assert (only["level"], only["host"]) == ("ERROR", "test")
    assert "runsc" in only["message"]
