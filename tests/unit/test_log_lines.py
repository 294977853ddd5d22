"""What a worker logs: an event a line, with whom it is about, and nothing that breaks a line or is secret."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import timeit
from datetime import datetime

import pytest

from worker import log_lines, secrets
from worker.errors import BadInput, RunscError
from worker.log_lines import Formatter, about, also_about, now_about
from worker.settings import load_settings
from worker.spec import make_spec

ID = "sb-0123456789abcdef"


@pytest.fixture(autouse=True)
def nobody():
    """No test is about what the one before it was about."""
    now_about()
    yield
    now_about()


def record(message="it works", *args, level=logging.INFO, error=None, **extra):
    detail = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("sandbatch", level, "file.py", 1, message, args, detail)
    made.__dict__.update(extra)
    return made


def line(*args, **more):
    return Formatter("h1", is_json=False).format(record(*args, **more))


def document(*args, **more):
    text = Formatter("h1", is_json=True).format(record(*args, **more))
    assert "\n" not in text
    return json.loads(text)


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_line_says_when_how_bad_and_whom_it_is_about():
    with about(sandbox=ID, batch="b-1", stage="network", attempt=2):
        moment, rest = line("failed: %s", "no such moon", level=logging.ERROR).split(" ", 1)

    assert datetime.fromisoformat(moment).utcoffset().total_seconds() == 0
    assert rest == (f"ERROR host=h1 sandbox={ID} batch=b-1 stage=network attempt=2: failed: no such moon")


def test_json_has_the_same_as_members():
    with about(sandbox=ID, batch="b-1", stage="network", attempt=2):
        found = document("failed: %s", "no such moon", level=logging.ERROR)

    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "ERROR",
        "host": "h1",
        "sandbox": ID,
        "batch": "b-1",
        "stage": "network",
        "attempt": 2,
        "message": "failed: no such moon",
    }


def test_what_is_not_known_is_left_out_and_a_call_s_own_word_counts_more():
    assert line("ready").endswith("INFO host=h1: ready")
    with about(sandbox="sb-other"):
        assert f"sandbox={ID}:" in line("dies", sandbox=ID)


def test_blocks_nest_and_end():
    with about(sandbox=ID, stage="network"):
        with about(stage="bundle", batch=None):
            assert "stage=bundle:" in line()
        assert "stage=network:" in line()
    assert "stage" not in line()


def test_one_task_after_another_keeps_nothing_of_the_one_before():
    now_about(sandbox=ID, stage="netns")
    also_about(batch="b-1")
    assert f"sandbox={ID} batch=b-1 stage=netns:" in line()
    now_about(stage="place")
    assert "INFO host=h1 stage=place:" in line()


def test_threads_and_asyncio_tasks_have_what_is_their_own():
    seen = []

    async def one(name):
        with about(sandbox=name):
            await asyncio.sleep(0)
            seen.append(line())

    async def both():
        await asyncio.gather(one("sb-a"), one("sb-b"))

    with about(sandbox=ID):
        thread = threading.Thread(target=lambda: seen.append(line()))
        thread.start()
        thread.join()
    asyncio.run(both())

    assert "sandbox" not in seen[0]
    assert ["sandbox=sb-a" in seen[1], "sandbox=sb-b" in seen[2]] == [True, True]


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\x00b", "a\x85b", "a\u2028b", "a\u202eb", "a\ud800b"]
)
def test_nothing_breaks_a_line_or_a_terminal(text):
    """journald and docker take each line for an event; a program's words may be anything."""
    found = line("%s", text)
    assert found.isprintable()
    assert found.endswith("b")
    found.encode()
    assert document("%s", text)["message"] == text


def test_words_that_have_no_end_are_cut():
    assert len(line("%s", "x" * 100_000)) < log_lines.MESSAGE + 200


def test_what_is_known_to_go_wrong_has_no_traceback():
    error = raised(RunscError("runsc start", "no such program", "see its log"))
    found = document("failed", level=logging.ERROR, error=error)
    assert found["message"] == "failed: runsc start: no such program; see its log"
    assert "traceback" not in found
    assert "Traceback" not in line("failed", level=logging.ERROR, error=error)


def test_the_words_of_an_error_are_not_said_twice():
    error = raised(BadInput("spec", "no"))
    assert line("failed: %s", error, error=error).count("spec: no") == 1


def test_a_defect_has_its_traceback_in_the_same_line():
    error = raised(KeyError("boom"))
    found = line("by a defect", level=logging.ERROR, error=error)
    assert "\n" not in found
    assert "\\nKeyError: 'boom'" in found
    assert document("by a defect", error=error)["traceback"].endswith("KeyError: 'boom'")


def test_a_log_call_with_the_wrong_arguments_keeps_its_words():
    assert "has %d of them (" in line("has %d of them", "many")


def test_a_sandbox_s_environment_is_hidden_while_the_lines_are_about_it():
    with about(sandbox=ID, env={"TOKEN": "s3cr3t-value", "N": "1", "EMPTY": ""}):
        found = line("it said TOKEN=s3cr3t-value N=1 of 1 and s3cr3t-val")
    assert found.endswith("it said TOKEN=*** *** of 1 and ***")


def test_a_secret_in_a_traceback_is_hidden_too():
    with about(env={"TOKEN": "s3cr3t-value"}):
        assert "s3cr3t" not in line(error=raised(KeyError("s3cr3t-value")))


def test_a_spec_that_is_refused_does_not_tell_its_environment():
    """pydantic's own words have the input."""
    with pytest.raises(BadInput) as refused:
        make_spec(args=["true"], env={"TOKEN": "s3cr3t\0value"})
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://worker:hunter22@db:6379/0 is away", "redis://***@db:6379/0 is away"),
        ("rediss://:p@db refused", "rediss://***@db refused"),
        ("unix:///run/x?password=hunter22&db=1", "unix:///run/x?password=***&db=1"),
        ("http://a/b and a@b", "http://a/b and a@b"),
    ],
)
def test_logins_of_urls_are_hidden(text, shown):
    assert secrets.hide(text) == shown


def test_the_broker_s_password_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    secrets.know_url("redis://worker:hunter%2F22@db")
    assert secrets.hide("AUTH worker hunter/22 hunter%2F22") == "AUTH worker *** ***"


@pytest.mark.parametrize(
    "text",
    [
        "PATH [/planted /secret/bin]",  # runsc
        r'{"env":["KEY=a\"planted\" \u003cb\u003e"]}',  # Go's JSON
        "second planted line",  # of which one is kept
        "cut /planted:/secr",
    ],
)
def test_values_are_found_as_programs_write_them(text):
    env = {
        "PATH": "/planted:/secret/bin",
        "KEY": 'a"planted" <b>',
        "KEYS": "first planted\nsecond planted line",
    }
    assert "planted" not in secrets.hide(text, env)


def test_an_error_loses_a_sandbox_s_environment_for_good():
    """Celery sends its arguments on, Flower and the record show its words."""
    error = RunscError("runsc start", "no x in PATH [/planted/bin]", "see /run")
    secrets.scrub(error, {"PATH": "/planted/bin"})
    assert (str(error), error.args) == (
        "runsc start: no x in PATH [***]; see /run",
        ("runsc start", "no x in PATH [***]", "see /run"),
    )


PROGRAM = """
import logging, os, sys, threading, warnings
from worker.log_lines import about, set_up
from worker.settings import Settings
set_up(Settings(host="h1", log_format=sys.argv[1], log_level=sys.argv[2]))
log = logging.getLogger("sandbatch")
log.debug("quiet")
with about(sandbox="sb-1"):
    if os.fork() == 0:
        log.info("child")
        os._exit(0)
    os.wait()
logging.getLogger("celery.app.trace").error("chatter")
logging.getLogger("celery.worker.strategy").info("chatter")
logging.getLogger("redis").debug("chatter")
logging.getLogger("celery.worker.consumer").warning("kept")
warnings.warn("old")
threading.Thread(target=lambda: 1 / 0, name="worker-thread").start()
"""


def run(*args):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_everything_that_a_process_writes_is_such_a_line():
    lines = [json.loads(one) for one in run("json", "info")]
    assert [one["message"].split(" ")[0].split(":")[0] for one in lines] == [
        *("child", "kept", "<string>", "worker-thread")
    ]
    assert lines[0]["sandbox"] == "sb-1"
    assert lines[1]["logger"] == "celery.worker.consumer"
    assert "ZeroDivisionError" in lines[3]["traceback"]


def test_the_level_is_that_of_the_settings():
    assert any(one.endswith("host=h1: quiet") for one in run("line", "debug"))
    assert [one.split(" ")[1] for one in run("line", "error")] == ["CRITICAL"]


@pytest.mark.parametrize(("name", "value"), [("log_format", "xml"), ("log_level", "loud")])
def test_another_word_is_refused(name, value):
    with pytest.raises(BadInput, match=f"setting {name}: '{value}' is not allowed"):
        load_settings(**{name: value})


def test_words_may_be_in_capitals(monkeypatch):
    monkeypatch.setenv("SANDBATCH_LOG_LEVEL", "INFO")
    assert load_settings(log_format="JSON").log_format == "json"


def test_nobody_who_reads_stops_no_work():
    """A pipe whose reader is gone: the launch goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    handler = log_lines._Lines(writer)
    handler.setFormatter(Formatter("h1", is_json=False))
    handler.emit(record())
    os.close(writer)


def test_a_line_costs_a_launch_next_to_nothing():
    """About 15 lines a launch of 200 ms of CPU: a line may take 0.2 ms at the very most."""
    env = {f"NAME{number}": f"value number {number}" for number in range(20)}
    with about(sandbox=ID, batch="b-1", stage="network", attempt=1, env=env):
        best = min(timeit.repeat(lambda: line("done in %.3f s", 0.02), number=200, repeat=5)) / 200
    assert best < 0.0002
