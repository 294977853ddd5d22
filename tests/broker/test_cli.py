"""The command line against a real broker, with a host's heartbeat in place of a host."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.client import Client
from tasks.state import State
from tests.broker.conftest import take
from tests.broker.test_submit import queues
from worker.spec import make_spec

LINE = re.compile(r"^sandbatch: \S.*: \S.*; \S.*\n$")
IDS = re.compile(r"^(sb-[0-9a-f]{16}\n)+$")
SPEC = make_spec(args=["sleep", "60"], labels={"team": "red"}, network="mynet")
A1, A2, B1 = "sb-00000000000000a1", "sb-00000000000000a2", "sb-00000000000000b1"


@pytest.fixture
def three(record):
    """Two sandboxes of one batch and one of another."""
    record.enqueue("red", [(A1, SPEC), (A2, SPEC)])
    time.sleep(0.002)  # the list is sorted by time
    record.enqueue("blue", [(B1, make_spec(args=["true"]))])
    return record


def moved(record, container_id: str, *states: State, **fields: str) -> None:
    record.put(container_id, State.PLACED, 1, {"host": "here"}, only_from=State.QUEUED)
    for state in states:
        assert record.put(container_id, state, 1, fields) > 0


# -- run -----------------------------------------------------------------------------------------


def test_run_prints_the_ids_and_nothing_else_on_stdout(cli, record, heartbeat, client):
    heartbeat()
    done = cli.process("run", "--count", "3", "--label", "team=red", "-e", "A=b=c", "--", "sleep", "60")
    assert done.returncode == 0
    assert IDS.match(done.stdout)
    ids = done.stdout.split()
    assert re.match(r"^batch b-[0-9a-f]{12}\n$", done.stderr)
    rows = record.get_all()
    assert {row["id"] for row in rows} == set(ids)
    assert rows[0]["spec"] == SPEC.model_dump() | {"kind": "spec/v4", "env": {"A": None}}
    assert record.whole_spec(ids[0], record.spec(ids[0])[0]).env == {"A": "b=c"}
    assert set(take(record, "here")) == set(ids)


def test_run_takes_the_words_after_the_command_as_its_arguments(cli, record, heartbeat):
    """`--count` behind it is not ours; nor is it without `--`."""
    heartbeat()
    cli("run", "--", "sh", "-c", "echo $A", "--count", "5", "--", "-x")
    cli("run", "sh", "--json")
    assert [row["args"] for row in record.get_all()] == [
        ["sh", "-c", "echo $A", "--count", "5", "--", "-x"],
        ["sh", "--json"],
    ]


def test_run_says_when_no_host_is_there_to_take_it(cli, broker):
    (broker.own_cni_conf_dir / "10-mynet.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "mynet", "plugins": [{"type": "bridge"}]})
    )
    try:
        done = cli("run", "--", "true")
    finally:
        (broker.own_cni_conf_dir / "10-mynet.conflist").unlink()
    assert done.returncode == 0, done.stderr
    assert "no host is up" in done.stderr


def test_run_adds_to_a_batch_that_is_there(cli, record, heartbeat):
    heartbeat()
    for _ in range(2):
        assert cli("run", "--batch-name", "mine", "--", "true").returncode == 0
    assert [row["batch"] for row in record.get_all()] == ["mine", "mine"]


def test_run_json_has_the_shape_of_the_contract(cli, heartbeat):
    heartbeat()
    (row,) = json.loads(cli("run", "--json", "--label", "team=red", "true").stdout)
    assert {
        *("id", "batch", "labels", "state", "host", "network", "ip", "ips", "image", "args"),
        *("created_at", "running_at", "ended_at", "exit_code", "error", "stages"),
    } <= set(row)
    assert (row["state"], row["image"], row["args"]) == ("queued", "host", ["true"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["created_at"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], "empty"),
        (["run", "--", ""], "empty"),
        (["run", "--network", "moon", "--", "true"], "network moon"),
        (["run", "--network", "../x", "--", "true"], "network"),
        (["run", "--rootfs", "/no/such", "--", "true"], "rootfs /no/such: there is no such folder"),
        (["run", "--rootfs", "/etc", "--", "true"], "not below an allowed folder"),
        (["run", "--rootfs", "ALLOWED/root/..", "--", "true"], "without '..'"),
        (["run", "--rootfs", "ALLOWED/../net.d", "--", "true"], "without '..'"),
        (["run", "--rootfs", "relative", "--", "true"], "absolute path"),
        (["run", "--host", "nowhere", "--", "true"], "known: here"),
        (["run", "--host", "a b", "--", "true"], "host name"),
        (["run", "--cwd", "tmp", "--", "true"], "absolute path"),
        (["run", "--ready", "tcp:0", "--", "true"], "from 1 to 65535"),
        (["run", "--ready-timeout", "0", "--", "true"], "greater than 0"),
        (["run", "--ready-timeout", "nan", "--", "true"], "ready_timeout_s"),
        (["run", "--env", "A", "--", "true"], "KEY=VALUE"),
        (["run", "--env", "A-B=hunter2", "--", "true"], "'A-B'"),
        (["run", "--label", "=x", "--", "true"], "KEY=VALUE"),
        (["run", "--batch-name", "a b", "--", "true"], "batch name"),
        (["run", "--count", "0", "--", "true"], "run"),
        (["run", "--count", "many", "--", "true"], "run"),
        (["run", "--nonsense", "--", "true"], "nonsense"),
        (["run", "--", b"\xff"], "UTF-8"),
        (["run", "--label", b"a=\xff", "--", "true"], "UTF-8"),
        (["run", "--batch-name", "a\nb", "--", "true"], "batch name"),
        (["show", "b1"], "b1: no such sandbox"),
        (["show", "sb-00000000000000c1"], "no such sandbox"),
        (["show", ""], "no such sandbox"),
        (["show", "a\nb"], "no such sandbox"),
        (["show", "sb-00000000000000a"], "2 sandboxes begin so"),
        (["show"], "ID"),
        (["wait"], "none given"),
        (["wait", "b1"], "b1: no such sandbox"),
        (["wait", A1, "--for", "ever"], "running or terminal"),
        (["wait", "--batch", "green"], "batch green"),
        (["rm"], "none given"),
        (["rm", "-f"], "none given"),
        (["rm", "b1"], "b1: no such sandbox"),
        (["rm", "sb-", "--force"], "3 sandboxes begin so"),
        (["rm", "--batch", "green"], "batch green"),
        (["rm", "--all", A1], "--all"),
        (["rm", "--all", "--batch", "red"], "--all"),
        (["ls", "--state", "happy"], "one of queued, placed"),
        (["ls", "--label", "x"], "KEY=VALUE"),
        (["ls", "--batch", "green"], "batch green"),
        (["dance"], "dance"),
        (["--config", "/no/such.toml", "ls"], "no such file"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_done(cli, three, heartbeat, client, broker, args, words):
    """Exit 2: a script can tell misuse from failure, and needs not clean up."""
    heartbeat()
    before = three.get_all()
    allowed = str(broker.rootfs_allow[0])
    done = cli(*(os.fsdecode(one).replace("ALLOWED", allowed) for one in args))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert LINE.match(done.stderr), done.stderr
    assert words in done.stderr
    assert "hunter2" not in done.stderr
    assert three.get_all() == before
    assert queues(client) == {}


@pytest.mark.parametrize("boot_id", ["of another machine", None])
def test_a_network_that_no_host_has_names_those_that_are_known(cli, heartbeat, record, boot_id):
    """On the host itself its files are looked at; elsewhere what the hosts say counts."""
    heartbeat("there", networks=["one", "two"], **({"boot_id": boot_id} if boot_id else {}))
    done = cli("run", "--network", "moon", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr)
    assert "network moon" in done.stderr
    assert ("known: one, two" if boot_id else "known: ") in done.stderr
    assert record.ids() == []


def test_elsewhere_the_hosts_say_which_folders_they_allow(cli, heartbeat, record):
    heartbeat("there", boot_id="of another machine", rootfs_allow=["/srv/roots"])
    done = cli("run", "--rootfs", "/srv/rootsX/a", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert "allowed: /srv/roots\n" in done.stderr
    assert cli("run", "--rootfs", "/srv/roots/a", "--", "true").returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--network", "one", "-p", "80"), "network one: publishes no ports: its list lacks a plugin"),
        (("--network", "two:ip=10.0.0.9"), "network two: takes no address"),
        (("--network", "one", "--network", "two", "-p", "80"), None),  # the first that can
        (("--network", "one", "--network", "three"), "network three: not every host has it; name the host"),
        (("--network", "one", "--network", "moon"), "network moon: no host has it; known: one, three, two"),
    ],
)
def test_elsewhere_the_hosts_say_what_their_networks_can(cli, heartbeat, record, options, words):
    """One host must have them all, with what the spec asks of each."""
    can = {"one": [], "two": ["portMappings"]}
    heartbeat("there", boot_id="of another machine", networks=["one", "two"], capabilities=can)
    heartbeat("yonder", boot_id="of a third machine", networks=["three"], capabilities={"three": []})
    done = cli("run", *options, "--", "true")
    if words is None:
        assert done.returncode == 0
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert record.ids() == []


def test_elsewhere_the_hosts_say_what_may_be_bound(cli, heartbeat, record):
    """A path of theirs is looked at by them alone: it is not there on a laptop."""
    heartbeat("there", boot_id="of another machine", mount_allow=["/srv/data"])
    for source, words in {"/srv/dataX": "allowed: /srv/data\n", "/srv/data/../x": "without '..'"}.items():
        done = cli("run", "-v", f"{source}:/data", "--", "true")
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
    assert cli("run", "-v", "/srv/data/a:/data", "--", "true").returncode == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("10-bad.conflist", '{\n  "name": "moon",\n  oops\n}', "line 3"),
        (
            "10-bad.conflist",
            '{\n "cniVersion": "1.0.0",\n "name": "moon",\n "plugins": 5}',
            "line 4: key plugins",
        ),
        (
            "10-bad.conf",
            '{"name": "moon",\n "cniVersion": "1.0.0",\n "type": 5}',
            "line 3: key type",
        ),
    ],
)
def test_a_cni_file_that_cannot_be_read_is_named_with_line_and_key(
    cli, heartbeat, broker, record, name, text, words
):
    """It may hide the network that was meant; a guess would attach a sandbox to another."""
    heartbeat()
    file = broker.cni_conf_dir / name
    file.write_text(text)
    try:
        done = cli("run", "--network", "moon", "--", "true")
    finally:
        file.unlink()
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr)
    assert f"CNI file {file}" in done.stderr
    assert words in done.stderr
    assert record.ids() == []


# -- without a broker ----------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["ls"], ["run", "--", "true"], ["hosts"], ["rm", "--all"], ["wait", A1]])
def test_without_a_broker_the_socket_is_named(cli, tmp_path, args):
    done = cli(*args, SANDBATCH_RUN_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert LINE.match(done.stderr), done.stderr
    assert f"redis+socket://{tmp_path}/broker.sock" in done.stderr


@pytest.mark.parametrize("kind", ["refused", "silent", "no name"])
def test_a_broker_that_does_not_answer_is_given_up_in_time_and_named_without_its_password(cli, kind):
    """Within 5 s (here with the time of a loaded machine on top)."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()
        place = "broker.invalid:1" if kind == "no name" else f"127.0.0.1:{server.getsockname()[1]}"
        begun = time.monotonic()
        done = cli.process("run", "--", "true", SANDBATCH_BROKER_URL=f"redis://me:hunter2@{place}/0")
        took_s = time.monotonic() - begun
    assert (done.returncode, done.stdout) == (1, "")
    assert LINE.match(done.stderr), done.stderr
    assert f"redis://me:***@{place}/0" in done.stderr
    assert "hunter2" not in done.stderr
    assert took_s < 15


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@h", "redis://me:hunter2@h:port", "redis://me:hunter2@127.0.0.1:1/?nonsense=1"]
)
def test_a_broker_url_that_is_none_is_misuse(cli, url):
    done = cli("ls", SANDBATCH_BROKER_URL=url)
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr), done.stderr
    assert "hunter2" not in done.stderr


def test_debug_shows_where_an_error_comes_from(cli, tmp_path):
    done = cli.python("-m", "cli", "--debug", "ls", SANDBATCH_RUN_DIR=str(tmp_path))
    assert "Traceback" in done.stderr
    assert "\nsandbatch: broker " in done.stderr


def test_a_program_ends_as_a_call_does(cli, tmp_path):
    """What the other tests see of the command line is what a shell sees."""
    done = cli.process("show", b"\xff\n", SANDBATCH_RUN_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert LINE.match(done.stderr)
    done = cli.process("dance")
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr)


# -- ls, show, hosts -----------------------------------------------------------------------------


def test_ls_without_sandboxes_is_an_empty_table(cli):
    done = cli("ls")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["ID", "STATE", "HOST", "IP", "NETWORK", "AGE", "COMMAND", "WHY"]
    assert cli.json("ls") == []


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        ([], [A1, A2, B1]),
        (["--batch", "red"], [A1, A2]),
        (["--label", "team=red"], [A1, A2]),
        (["--label", "team=red", "--label", "x=y"], []),
        (["--state", "running"], [A2]),
        (["--state", "running", "--state", "queued"], [A1, A2, B1]),
        (["--host", "here"], [A2]),
        (["--host", "there"], []),
    ],
    ids=str,
)
def test_ls_filters(cli, three, args, ids):
    moved(three, A2, State.RUNNING)
    assert [row["id"] for row in cli.json("ls", *args)] == ids


def test_ls_in_a_pipe_cuts_nothing_and_has_no_colours(cli, three):
    error = json.dumps({"stage": "network", "message": "x" * 300})
    moved(three, A1, State.FAILED, error=error)
    done = cli.process("ls")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:3] == [A1, "failed", "here"]
    assert f"network: {'x' * 300}" in lines[1]
    assert "\x1b" not in done.stdout


def test_ls_leaves_out_what_was_removed_unless_asked(cli, three):
    cli("rm", "--no-wait", A1)
    assert [row["id"] for row in cli.json("ls")] == [A2, B1]
    assert [row["id"] for row in cli.json("ls", "--all")] == [A1, A2, B1]
    assert [row["id"] for row in cli.json("ls", "--batch", "red")] == [A1, A2]


def test_ls_watch_prints_a_line_for_each_change_until_ctrl_c(cli, three):
    argv = [sys.executable, "-m", "cli", "ls", "--watch", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cli.environment) as watch:
        seen = [json.loads(watch.stdout.readline()) for _ in range(3)]
        assert [row["id"] for row in seen] == [A1, A2, B1]
        moved(three, B1, State.RUNNING)
        states = [json.loads(watch.stdout.readline())["state"]]
        if states == ["placed"]:  # it looked between the two moves
            states.append(json.loads(watch.stdout.readline())["state"])
        assert states[-1] == "running"
        watch.send_signal(signal.SIGINT)
        assert watch.wait(30) == 130
        assert watch.stderr.read() == b""


def test_a_reader_that_hangs_up_is_no_traceback(cli, three):
    """`sandbatch ls | head -1`."""
    three.enqueue("many", [(f"sb-{number:016x}", SPEC) for number in range(2000)])
    script = f"{sys.executable} -m cli ls | head -1"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, env=cli.environment, timeout=60, check=False
    )
    assert done.stdout.startswith("ID")
    assert done.stderr == ""


def test_show_has_the_timeline(cli, three):
    stages = [
        {"name": "netns", "verb": "do", "state": "done", "started_at": "2026-01-01T00:00:00.000Z"}
        | {"ended_at": "2026-01-01T00:00:00.250Z", "duration_s": 0.25, "error": None},
        {"name": "network", "verb": "do", "state": "failed", "started_at": "2026-01-01T00:00:00.250Z"}
        | {"ended_at": "2026-01-01T00:00:01.250Z", "duration_s": 1.0, "error": "no moon"},
    ]
    moved(three, A1, State.UNDOING, stages=json.dumps(stages), ip="10.0.0.2", ips='["10.0.0.2"]')
    shown = cli.json("show", A1)
    assert [run["do|undo"] for run in shown["stages"]] == ["do", "do"]
    assert {"name", "state", "started_at", "ended_at", "duration_s", "error"} <= set(shown["stages"][0])
    assert (shown["ip"], shown["network"], shown["labels"]) == ("10.0.0.2", "mynet", {"team": "red"})
    text = cli("show", A1).stdout
    assert re.search(r"network +do +failed +2026-01-01T00:00:00\.250Z +1\.000 +no moon", text)
    assert "sleep 60" in text


def test_show_takes_a_prefix_that_one_id_has(cli, three):
    assert cli.json("show", "sb-00000000000000b")["id"] == B1
    assert cli.json("show", A1)["id"] == A1


def test_an_id_whose_record_has_expired_is_unknown(cli, three, client):
    """A day after its end the index may still have it; it stands in no other's way, either."""
    client.delete(f"sandbatch:sb:{A1}")
    for command in ("show", "wait", "rm"):
        done = cli.process(command, A1)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{A1}: no such sandbox" in done.stderr
    assert cli.json("show", "sb-00000000000000a")["id"] == A2


def test_hosts(cli, heartbeat):
    heartbeat("h2")
    heartbeat("h1", networks=["one", "two"])
    rows = cli.json("hosts")
    assert [row["name"] for row in rows] == ["h1", "h2"]
    assert {"capacity", "slots", "sandboxes", "heartbeat_at", "networks", "version"} <= set(rows[0])
    lines = cli("hosts").stdout.splitlines()
    assert lines[1].split()[:4] == ["h1", "live", "0s", "0/10"]
    assert "one, two" in lines[1]


# -- wait, rm ------------------------------------------------------------------------------------


def waiting(cli, *args: str, stdin: "Path | None" = None) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "cli", *args]
    with open(stdin or os.devnull) as given:
        return subprocess.Popen(
            argv,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=cli.environment,
        )


def follower_comes(client) -> None:
    """Until somebody waits in the stream of events: broker and test share no other event."""
    deadline = time.monotonic() + 30
    while not client.info("clients")["blocked_clients"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("goal", "states", "code"),
    [
        ("running", [State.RUNNING], 0),
        ("running", [State.FAILED], 1),
        ("running", [State.RUNNING, State.EXITED], 0),
        ("running", [State.STUCK], 1),
        ("terminal", [State.EXITED], 0),
        ("terminal", [State.FAILED], 1),
        ("terminal", [State.CANCELLED], 0),
    ],
)
def test_wait_ends_with_what_became_of_them(cli, three, goal, states, code):
    error = json.dumps({"stage": "network", "message": "no moon"}) if states[-1] == State.FAILED else ""
    moved(three, B1, *states, error=error)
    done = cli("wait", B1, "--for", goal)
    assert (done.returncode, done.stdout) == (code, "")
    if error:
        assert done.stderr == f"sandbatch: {B1}: failed at network: no moon\n"


def test_wait_hears_of_the_end_by_an_event(cli, three, client):
    with waiting(cli, "wait", "--batch", "red", "--for", "running") as process:
        follower_comes(client)
        for one in (A1, A2):
            moved(three, one, State.LAUNCHING, State.RUNNING)
        assert process.wait(30) == 0


def test_wait_misses_nothing_that_happens_after_its_first_look(three, broker):
    """The mark in the stream is taken before the look: else an end in between is waited for in vain."""
    looks = []

    def on_change(states: dict[str, str]) -> None:
        if not looks:
            moved(three, A1, State.RUNNING)
        looks.append(dict(states))

    assert Client(broker).wait([A1], "running", 10, on_change) == {A1: "running"}
    assert looks[0] == {A1: "queued"}


def test_wait_gives_up_when_its_time_is_over(cli, three):
    done = cli("wait", A1, A2, "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "2 of 2 not there yet" in done.stderr


def test_wait_can_be_interrupted(cli, three, client):
    with waiting(cli, "wait", A1) as process:
        follower_comes(client)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""


def test_rm_cancels_what_nobody_has_taken_and_prints_the_ids(cli, three, client):
    done = cli("rm", "--batch", "red")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [A1, A2]
    assert {row["state"] for row in three.get_all([A1, A2])} == {"cancelled"}
    assert three.get(B1)["state"] == "queued"
    assert queues(client) == {}


def test_rm_waits_until_the_host_has_undone_it(cli, three, client, heartbeat):
    heartbeat()
    moved(three, A1, State.RUNNING)
    with waiting(cli, "rm", A1) as process:
        follower_comes(client)
        assert list(queues(client)) == [("host.here", 0)]
        moved(three, A1, State.STOPPING, State.EXITED)
        assert process.wait(30) == 0
        assert process.stdout.read() == f"{A1}\n"


def test_rm_of_what_a_dead_host_has_does_not_wait_for_it(cli, three, client):
    """Nobody knows how long that would be; the wish stays, and the host finds it when it is back."""
    moved(three, A1, State.RUNNING)
    done = cli("rm", A1)
    assert (done.returncode, done.stdout) == (1, f"{A1}\n")
    assert "host here is not up; it undoes them once it is back" in done.stderr
    assert list(queues(client)) == [("host.here", 0)]


def test_rm_gives_up_on_what_is_stuck_and_says_so(cli, three, heartbeat):
    heartbeat()
    moved(three, A1, State.STUCK)
    done = cli("rm", A1)
    assert (done.returncode, done.stdout) == (1, f"{A1}\n")
    assert "stuck" in done.stderr
    assert A1 in done.stderr


def test_rm_all_removes_all_and_then_nothing(cli, three):
    assert sorted(cli("rm", "--all").stdout.split()) == [A1, A2, B1]
    done = cli("rm", "--all")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rm_force_removes_what_is_known_and_passes_over_the_rest(cli, three):
    """As in docker: a script that clears up must not leave one for the sake of another."""
    done = cli("rm", "--force", "sb-ffffffffffffffff", A1, "nonsense")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{A1}\n", "")
    assert three.get(A1)["state"] == "cancelled"
    assert cli("rm", "--force", "--batch", "green").returncode == 0


# -- help ----------------------------------------------------------------------------------------


def test_every_command_has_an_example_and_needs_no_broker_for_its_help(cli, tmp_path):
    text = cli("--help", SANDBATCH_RUN_DIR=str(tmp_path)).stdout
    commands = re.findall(r"^│ (\w+) ", text, re.MULTILINE)
    assert {"run", "ls", "show", "wait", "rm", "hosts", "audit", "doctor", "setup", "up"} <= set(commands)
    for command in ("run", "ls", "rm"):
        assert f"Example: sandbatch {command}" in cli(command, "--help").stdout
