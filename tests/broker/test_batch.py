"""Batches on the command line: `batch`, `batches`, `cancel`, `wait --batch`. Their hosts are the tests."""

import json
import os
import pty
import re
import resource
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tasks.state import State
from tests.broker.conftest import take
from tests.broker.test_cli import LINE, follower_comes, waiting

FILE = "name: nightly\nsuccess: 2\nspecs:\n- command: sleep 60\n  network: mynet\n  count: 3\n"
ERROR = json.dumps({"stage": "network", "message": "no moon"})


@pytest.fixture
def file(tmp_path: Path, heartbeat) -> str:
    """A batch of three, of which two are to succeed."""
    heartbeat()
    (tmp_path / "jobs.yaml").write_text(FILE)
    return str(tmp_path / "jobs.yaml")


def end(record, ids: list[str], state: State = State.EXITED, **fields: str) -> None:
    """What a host reports of sandboxes that it has taken."""
    for one in ids:
        for move in (State.LAUNCHING, State.RUNNING):
            assert record.put(one, move, 1, {}) == 1
        assert record.put(one, state, 1, {"exit_code": "0", "reason": "exit", **fields}) > 0


# -- batch ---------------------------------------------------------------------------------------


def test_batch_enqueues_the_file_and_prints_the_id(cli, file, record):
    done = cli.process("batch", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nightly\n", "3 sandboxes\n")
    assert len(take(record, "here")) == 3
    batch = record.batch("nightly")
    assert (batch["total"], batch["needed"]) == (3, 2)


def test_batch_reads_stdin_and_takes_options(cli, file, record):
    argv = ["batch", "-", "--name", "mine", "--success", "all", "--max-in-flight", "2", "--waves", "1,5"]
    with waiting(cli, *argv, "--json", stdin=Path(file)) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    shown = json.loads(out)
    assert (shown["batch"], shown["total"], shown["held"], shown["starting"]) == ("mine", 3, 2, 1)
    assert shown["rule"] == {"success": "all", "max_in_flight": 2, "waves": [1, 5]}
    assert record.batch_ids("mine") == shown["ids"]


def test_a_file_with_bad_specs_enqueues_nothing_and_names_every_line(
    cli, record, heartbeat, tmp_path, client
):
    heartbeat()
    (tmp_path / "jobs.yaml").write_text(FILE + "- command: x\n  memry: 5\n- command: x\n  cpus: many\n")
    keys = set(client.keys("*"))
    done = cli("batch", str(tmp_path / "jobs.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    told = done.stderr.splitlines(keepends=True)
    assert all(LINE.match(one) for one in told)
    assert ["line 8: memry" in told[0], "line 10: cpus" in told[1], "nothing is enqueued" in told[2]] == [
        True
    ] * 3
    assert set(client.keys("*")) == keys


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("- {command: x, network: moon}\n", "line 7: network moon: no"),
        ("  host: nowhere\n", "line 7: host nowhere: no such host; known: here"),
        ("  on: {gpu: true}\n", "line 7: on gpu=true: no host has these labels; known: "),
        ("  publish: [80]\n", "network mynet: publishes no ports"),
        (
            "  memory: 1m\n",
            "line 7: memory: gVisor and a small program do not start in 1m; give it 24m or more",
        ),
    ],
)
def test_what_no_host_can_do_is_refused_with_its_line(cli, record, heartbeat, tmp_path, more, words):
    heartbeat(boot_id="of another machine", capabilities={"mynet": []})
    (tmp_path / "jobs.yaml").write_text(FILE + more + "- command: x\n  network: mynet\n")
    done = cli("batch", str(tmp_path / "jobs.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert record.ids() == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["batch", "FILE", "--report", "x.xml"], "--report: goes with --wait"),
        (["batch", "FILE", "--wait", "--report", "x.txt"], "--report x.txt: its ending says no format"),
        (["batch", "FILE", "--wait", "--report", "/no/such/x.xml"], "cannot be written there"),
        (["batch", "FILE", "--timeout", "5"], "--timeout: goes with --wait"),
        (["batch", "FILE", "--success", "9"], "success 9: there are 3 sandboxes"),
        (["batch", "FILE", "--waves", "1,x"], "--waves x: a number is needed"),
        (["batch", "FILE", "--name", "a b"], "--name 'a b'"),
        (["batch", "FILE", "--name", "there"], "batch there: there is one already; choose another name"),
        (["batch", "FILE", "--deadline", "soon"], "--deadline soon"),
        (["batch", "/no/such"], "batch /no/such: No such file"),
        (["batch", "/"], "batch /: Is a directory"),
        (["wait", "--report", "x.xml", "sb-1"], "--report: is for a batch"),
        (["wait", "--batch", "there", "--report", "x.txt"], "its ending says no format"),
        (["wait", "--batch", "green"], "batch green: no such batch"),
        (["cancel", "green"], "batch green: no such batch"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_done(cli, file, record, args, words):
    assert cli("batch", file, "--name", "there").returncode == 0
    before = record.get_all()
    done = cli(*(one.replace("FILE", file) for one in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr), done.stderr
    assert words in done.stderr
    assert record.get_all() == before


def test_ten_thousand_specs_are_enqueued_in_time(cli, tmp_path, record, broker):
    """Read, checked and written within 5 s, measured on an idle machine: nearly all is this process's own."""
    network = {"cniVersion": "1.0.0", "name": "mynet", "plugins": [{"type": "bridge"}]}
    (broker.cni_conf_dir / "10-mynet.conflist").write_text(json.dumps(network))
    text = "".join(
        f"- command: [echo, '{one}']\n  memory: 64m\n  env: {{A: '{one}', B: b}}\n  network: mynet\n"
        for one in range(10_000)
    )
    (tmp_path / "jobs.yaml").write_text(text)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cli.process("batch", str(tmp_path / "jobs.yaml"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (broker.cni_conf_dir / "10-mynet.conflist").unlink()
    assert done.returncode == 0, done.stderr
    assert record.batch(done.stdout.strip())["total"] == 10_000
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 8, f"{cpu_s:.2f} s of CPU"  # 3 s where nothing else runs


# -- wait ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "code", "words"),
    [
        (("0", "0", "1"), 0, "batch nightly succeeded: 2 good, 1 bad of 3"),
        (("0", "1", "1"), 1, "batch nightly failed: 1 good, 2 bad of 3"),
    ],
)
def test_wait_ends_as_the_rule_says_and_hears_of_it_by_an_event(
    cli, file, record, client, codes, code, words
):
    cli("batch", file)
    with waiting(cli, "wait", "--batch", "nightly") as process:
        follower_comes(client)
        ids = take(record, "here")
        for one, exit_code in zip(ids, codes, strict=True):
            end(record, [one], exit_code=exit_code)
        assert process.wait(30) == code
        assert sorted(process.stdout.read().split("\n")) == sorted(
            ["", *(f"{one} {exit_code}" for one, exit_code in zip(ids, codes, strict=True))]
        )
        assert words in process.stderr.read()


def test_a_batch_of_run_has_no_rule_and_a_code_that_is_not_0_is_no_failure(cli, record, heartbeat):
    """As ever: `wait` says how they ended, and fails if a sandbox failed."""
    heartbeat()
    cli("run", "--batch-name", "plain", "--count", "2", "--", "true")
    end(record, take(record, "here"), exit_code="7")
    assert cli("wait", "--batch", "plain").returncode == 0
    cli("run", "--batch-name", "plain", "--", "true")
    end(record, take(record, "here"), State.FAILED, error=ERROR)
    done = cli("wait", "--batch", "plain")
    assert done.returncode == 1
    assert "failed at network: no moon" in done.stderr


def test_wait_for_running_is_content_with_as_many_as_the_rule_asks_for(cli, file, record):
    cli("batch", file)
    one, *others = take(record, "here")
    end(record, [one], State.FAILED, error=ERROR)
    for other in others:
        record.put(other, State.RUNNING, 1, {})
    assert cli("wait", "--batch", "nightly", "--for", "running").returncode == 0


def test_batch_wait_writes_the_report(cli, file, record, client, tmp_path):
    report = tmp_path / "jobs.xml"
    with waiting(cli, "batch", file, "--wait", "--report", str(report)) as process:
        follower_comes(client)
        ids = take(record, "here")
        end(record, ids[:2])
        end(record, ids[2:], State.FAILED, error=ERROR)
        assert process.wait(30) == 0
        assert process.stdout.read() == "nightly\n"
    suite = ET.parse(report).getroot()  # noqa: S314 - our own
    assert (suite.attrib["tests"], suite.attrib["errors"]) == ("3", "1")
    assert cli("wait", "--batch", "nightly", "--report", str(tmp_path / "later.json")).returncode == 0
    later = json.loads((tmp_path / "later.json").read_text())
    assert (later["batch"]["outcome"], [one["id"] for one in later["sandboxes"]]) == ("succeeded", ids)


def test_a_wait_that_gives_up_says_so_and_writes_what_there_is(cli, file, record, tmp_path):
    cli("batch", file)
    end(record, take(record, "here")[:1])
    report = tmp_path / "r.json"
    done = cli("wait", "--batch", "nightly", "--timeout", "0.2", "--report", str(report))
    assert done.returncode == 1
    assert "2 of 3 not there yet" in done.stderr
    assert len(json.loads(report.read_text())["sandboxes"]) == 3


def test_ctrl_c_leaves_the_batch_and_says_how_to_go_on(cli, file, record, client):
    cli("batch", file)
    with waiting(cli, "wait", "--batch", "nightly") as process:
        follower_comes(client)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        told = process.stderr.read()
    assert "batch nightly goes on: sandbatch wait --batch nightly, or sandbatch cancel nightly" in told
    assert {row["state"] for row in record.get_all()} == {"queued"}


def test_a_log_gets_few_lines_and_no_drawing(cli, file, record, client):
    cli("batch", file)
    with waiting(cli, "wait", "--batch", "nightly") as process:
        follower_comes(client)
        end(record, take(record, "here"))
        assert process.wait(30) == 0
        told = process.stderr.read().splitlines()
    assert told[0].startswith(
        "batch nightly: 3 queued, 0 launching, 0 running, 0 done, 0 failed; 0.0/s, - left"
    )
    assert told[1:] == ["batch nightly succeeded: 3 good, 0 bad of 3"]


def test_a_terminal_gets_a_live_bar(cli, file, record, client):
    cli("batch", file)
    parent, child = pty.openpty()
    environment = {**cli.environment, "COLUMNS": "100", "TERM": "xterm"}
    argv = [sys.executable, "-m", "cli", "wait", "--batch", "nightly"]
    pid = os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, child, 2), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    os.close(child)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            seen += os.read(parent, 4096)

    until(b"3 queued, 0 launching, 0 running, 0 done, 0 failed")
    follower_comes(client)
    first, *others = take(record, "here")
    until(b"0 queued, 3 launching")
    end(record, [first])
    until(b"2 launching, 0 running, 1 done, 0 failed")
    until(b"1/3")
    end(record, others[:1], State.FAILED, error=ERROR)
    end(record, others[1:])
    until(b"batch nightly succeeded: 2 good, 1 bad of 3")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(parent)
    assert re.search(rb"\d\.\d/s, \d:\d\d:\d\d left", seen)


# -- batches, cancel -----------------------------------------------------------------------------


def test_batches_are_listed_with_how_far_they_are(cli, file, record):
    assert cli.json("batches") == []
    cli("batch", file, "--max-in-flight", "2")
    first, _ = take(record, "here")
    record.put(first, State.RUNNING, 1, {})
    (row,) = cli.json("batches")
    counts = {
        name: row[name] for name in ("name", "total", "held", "starting", "running", "ended", "outcome")
    }
    assert list(counts.values()) == ["nightly", 3, 1, 1, 1, 0, None]
    header, line = cli("batches").stdout.splitlines()
    assert header.split() == [
        "BATCH",
        "AGE",
        "TOTAL",
        "HELD",
        "STARTING",
        "RUNNING",
        "GOOD",
        "BAD",
        "OUTCOME",
    ]
    assert line.split()[0] == "nightly"
    assert line.split()[2:] == ["3", "1", "1", "1", "0", "0", "-"]


def test_cancel_drops_what_waits_and_prints_the_ids(cli, file, record):
    cli("batch", file, "--max-in-flight", "2")
    done = cli("cancel", "nightly")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == record.batch_ids("nightly")
    assert {row["state"] for row in record.get_all()} == {"cancelled"}
    assert cli.json("batches")[0]["outcome"] == "cancelled"
    assert take(record, "here") == []
    done = cli("cancel", "nightly")
    assert (done.returncode, done.stdout) == (0, "")
    assert "has ended already" in done.stderr
    assert cli("wait", "--batch", "nightly").returncode == 1  # its rule was not kept


def test_cancel_waits_until_hosts_have_undone_what_runs(cli, file, record, client):
    cli("batch", file)
    ids = take(record, "here")
    end(record, ids[:1])
    for one in ids[1:]:
        record.put(one, State.RUNNING, 1, {})
    with waiting(cli, "cancel", "nightly", "--json") as process:
        follower_comes(client)
        for one in ids[1:]:
            record.put(one, State.CANCELLED, 1, {"reason": "cancel"})
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    shown = json.loads(out)
    assert (shown["ids"], shown["outcome"], shown["good"], shown["bad"]) == (ids[1:], "cancelled", 1, 2)


def test_cancel_does_not_wait_for_a_host_that_is_away(cli, file, record, client):
    cli("batch", file)
    (one,) = take(record, "gone", slots=1)
    record.put(one, State.RUNNING, 1, {})
    done = cli("cancel", "nightly")
    assert done.returncode == 1
    assert f"{one}: host gone is not up; it undoes them once it is back" in done.stderr
    assert cli("cancel", "nightly", "--no-wait").returncode == 0


def test_a_plain_ls_has_no_time_for_batches(cli):
    """Their modules, and YAML, are imported by those who read files."""
    code = "import sys, cli.main, cli.ls; print([one for one in sys.modules if one in ('yaml', 'cli.batch')])"
    assert cli.python("-c", code).stdout == "[]\n"
