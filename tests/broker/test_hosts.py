"""Hosts in the record and on the command line: live, lost, stopped; drained and resumed; forgotten."""

import json
import threading
import time
from typing import Any

import pytest
import redis

from cli.away import Away
from tasks import drains
from tasks.record import Record
from tasks.state import State
from tests.broker.conftest import CommandLine, take
from tests.broker.test_cli import LINE
from worker.settings import Settings
from worker.spec import make_spec

A, B = "sb-00000000000000a1", "sb-00000000000000a2"
SPEC = make_spec(args=["true"], network="mynet")
ON_H1 = make_spec(args=["true"], network="mynet", host="h1")


def silence(client: "redis.Redis", *hosts: str) -> None:
    """As when they have not been heard of for 30 s."""
    client.delete(*(f"sandbatch:host:{host}" for host in hosts))


@pytest.fixture
def settings(broker: Settings, tmp_path: Any) -> Settings:
    """Of the host h1, with a disk of its own."""
    return broker.model_copy(update={"host": "h1", "state_dir": tmp_path})


@pytest.fixture
def on_h1(record: Record, heartbeat: Any) -> Record:
    """h1 runs A and launches B; h2 has nothing."""
    heartbeat("h1", pulls=True, memory=2**34)
    record.enqueue("b-1", [(A, SPEC), (B, SPEC)])
    assert take(record, "h1", memory=2**34, each=2**20) == [A, B]
    heartbeat("h2", pulls=True, memory=2**34)  # only now: h1 would have taken its share
    assert record.put(A, State.RUNNING, 1, {}) == 1
    return record


# -- what is known of them -------------------------------------------------------------------------


def test_a_host_is_live_or_lost_or_stopped(record, heartbeat, client):
    for name in ("h1", "h2", "h3"):
        heartbeat(name, pulls=True)
    silence(client, "h2")
    record.leave("h3")
    assert {name: one["state"] for name, one in record.all_hosts().items()} == {
        "h1": "live",
        "h2": "lost",
        "h3": "stopped",
    }
    assert list(record.live_hosts()) == ["h1"]
    heartbeat("h3", pulls=True)
    assert record.all_hosts()["h3"]["state"] == "live"


def test_what_the_record_knows_better_is_of_this_moment(on_h1):
    """A heartbeat is up to five seconds old: why something waits would be told wrongly."""
    facts = on_h1.all_hosts()["h1"]
    assert (facts["sandboxes"], facts["launching"], facts["memory_asked"]) == (2, 1, 2**21)
    on_h1.put(A, State.EXITED, 1, {"exit_code": "0"})
    facts = on_h1.all_hosts()["h1"]
    assert (facts["sandboxes"], facts["launching"], facts["memory_asked"]) == (1, 1, 2**20)


def test_a_host_of_the_release_before_is_lost_too(record, heartbeat, client):
    """It notes nothing for that itself; the sweep of the fleet does it for it."""
    heartbeat("h1", version="0.1.0", pulls=False)
    client.delete("sandbatch:hosts:last")
    assert record.all_hosts()["h1"]["state"] == "live"
    record.missing_hosts(1)
    silence(client, "h1")
    assert record.all_hosts()["h1"]["state"] == "lost"


def test_hosts_shows_room_state_labels_and_drain(cli, on_h1, heartbeat, client):
    heartbeat("h1", memory=2**34, load=0.5, cpus=2, labels={"gpu": "true"}, runsc="release-1", foreign=2)
    on_h1.drain("h1", True, "new disk")
    silence(client, "h2")
    rows = {row["name"]: row for row in cli.json("hosts")}
    assert (rows["h1"]["state"], rows["h2"]["state"]) == ("live", "lost")
    assert rows["h1"]["drained"]["why"] == "new disk"
    header, first, second = cli("hosts").stdout.splitlines()
    assert header.split()[:7] == ["HOST", "STATE", "HEARTBEAT", "SANDBOXES", "LAUNCHING", "MEMORY", "LOAD"]
    assert first.split()[3:9] == ["2/10", "1/4", "0.0/16.0g", "0.5/2", "0.2.0", "release-1"]
    assert "gpu=true" in first
    assert first.endswith("drained: new disk; 2 messages of another release wait: upgrade it")
    assert second.split()[:2] == ["h2", "lost"]


# -- drain -----------------------------------------------------------------------------------------


def test_a_drained_host_takes_nothing_until_it_is_resumed(cli, record, heartbeat):
    heartbeat("h1", pulls=True)
    record.enqueue("b-1", [(A, SPEC), (B, ON_H1)])
    done = cli("drain", "h1", "--why", "new disk")
    assert (done.returncode, done.stdout) == (0, "h1\n")
    assert take(record, "h1") == []
    rows = {row["id"]: row for row in cli.json("ls")}
    assert {row["why"] for row in rows.values()} == {"host h1 is drained: new disk"}
    marks = record.bells("h1")
    assert cli("resume", "h1").stdout == "h1\n"
    assert record.bells("h1") != marks, "it is woken"
    assert sorted(take(record, "h1")) == [A, B]
    assert record.all_hosts()["h1"]["drained"] is None


def test_who_drains_again_without_a_reason_leaves_the_reason(cli, on_h1):
    cli("drain", "h1", "--why", "new disk")
    cli("drain", "h1")
    assert on_h1.drain_of("h1")["why"] == "new disk"
    cli("drain", "h1", "--why", "new board")
    assert on_h1.drain_of("h1")["why"] == "new board"


def test_drain_says_that_sandboxes_are_not_moved(cli, on_h1):
    done = cli("drain", "h1")
    assert "2 sandboxes on h1, which are not moved: sandbatch rm --host h1 ends them" in done.stderr
    assert on_h1.get(A)["state"] == "running"


def test_drain_waits_until_none_is_left(cli, on_h1):
    ends = threading.Timer(0.3, lambda: [on_h1.put(one, State.FAILED, 1, {}) for one in (A, B)])
    ends.start()
    began = time.monotonic()
    done = cli("drain", "h1", "--wait", "--timeout", "20")
    ends.join()
    assert done.returncode == 0
    assert 0.2 < time.monotonic() - began < 2, "it is told, it does not ask again and again"


def test_drain_waits_no_longer_than_it_is_told(cli, on_h1):
    done = cli("drain", "h1", "--wait", "--timeout", "0.1")
    assert done.returncode == 1
    assert "2 sandboxes still on h1; see sandbatch ls --host h1" in done.stderr


def test_a_lost_host_can_be_drained_and_finds_it_when_it_returns(cli, on_h1, client, heartbeat):
    silence(client, "h1")
    done = cli("drain", "h1", "--wait", "--timeout", "2.5")
    assert done.returncode == 1
    assert "host h1 is lost since" in done.stderr
    assert "stays drained when it returns" in done.stderr
    assert "known when it returns" in done.stderr, "a wait says what it waits for"
    heartbeat("h1", pulls=True)
    assert on_h1.all_hosts()["h1"]["drained"]["drained"] is True


@pytest.mark.parametrize("args", [("drain", "h9"), ("resume", "h9"), ("hosts", "--forget", "h9")])
def test_a_host_that_is_not_known_is_refused(cli, on_h1, args):
    done = cli(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr)
    assert "known: h1, h2" in done.stderr
    assert on_h1.drain_of("h9") is None


def test_the_newest_wish_counts_whatever_the_clocks_say(record, client):
    """Two people drain and resume from two machines, one of them an hour ahead."""
    ahead = {"drained": True, "at": time.time() + 3600, "why": ""}
    client.hset("sandbatch:drains", "h1", json.dumps(ahead))
    record.drain("h1", False)
    assert record.drain_of("h1")["drained"] is False
    assert record.drain_of("h1")["at"] > ahead["at"]


def test_a_drain_outlives_a_broker_that_lost_its_data(record, client, settings):
    record.drain("h1", True, "new disk")
    wish = record.drain_of("h1")
    assert drains.settle(record, settings) == wish
    client.flushall()
    assert drains.settle(record, settings) == wish
    assert record.drain_of("h1") == wish
    record.enqueue("b-1", [(A, SPEC)])
    assert take(record, "h1") == []


def test_a_resume_that_the_host_did_not_hear_counts_when_it_comes_back(record, settings):
    record.drain("h1", True)
    drains.settle(record, settings)
    record.drain("h1", False)
    assert drains.settle(record, settings)["drained"] is False
    assert json.loads((settings.state_dir / drains.FILE).read_text())["drained"] is False


@pytest.mark.parametrize("text", ["", "{", '{"drained": true}', "[]"])
def test_a_note_on_disk_that_cannot_be_read_stops_no_heart(record, settings, text):
    (settings.state_dir / drains.FILE).write_text(text)
    assert drains.settle(record, settings) is None
    record.drain("h1", True)
    assert drains.settle(record, settings)["drained"] is True


def test_a_disk_that_cannot_be_written_stops_no_heart(record, settings, caplog):
    gone = settings.model_copy(update={"state_dir": settings.state_dir / "gone"})
    record.drain("h1", True)
    assert drains.settle(record, gone)["drained"] is True
    assert "cannot be written" in caplog.text


# -- lost: what it had is unknown -----------------------------------------------------------------


def test_what_a_lost_host_has_is_unknown_until_it_returns(cli, on_h1, client, heartbeat):
    """The record is not touched: when the host returns its journals decide."""
    silence(client, "h1")
    rows = {row["id"]: row for row in cli.json("ls")}
    assert (rows[A]["state"], rows[A]["last_state"]) == ("unknown", "running")
    assert (rows[B]["state"], rows[B]["last_state"]) == ("unknown", "placed")
    assert rows[A]["why"].startswith("host h1 is lost since ")
    assert client.hget(f"sandbatch:sb:{A}", "state") == "running"
    assert [row["id"] for row in cli.json("ls", "--state", "unknown")] == [A, B]
    assert cli.json("ls", "--state", "running") == []
    assert "unknown" in cli("ls").stdout
    assert "it was running" in cli("show", A).stdout
    heartbeat("h1", pulls=True)
    assert cli.json("show", A)["state"] == "running"
    assert cli.json("show", A)["last_state"] is None


def test_what_has_ended_on_a_lost_host_stays_ended(on_h1, client):
    on_h1.put(A, State.EXITED, 1, {"exit_code": "0"})
    silence(client, "h1")
    assert on_h1.get(A)["state"] == "exited"


def test_a_stopped_host_says_that_its_sandboxes_go_on(on_h1):
    on_h1.leave("h1")
    assert on_h1.get(A)["state"] == "running"


def test_pinned_work_of_a_lost_host_waits_for_it(cli, on_h1, client):
    on_h1.enqueue("b-2", [("sb-00000000000000c1", ON_H1)])
    silence(client, "h1")
    (row,) = cli.json("ls", "--batch", "b-2")
    assert row["state"] == "queued"
    assert row["why"].startswith("host h1 is lost since ")


@pytest.mark.parametrize("command", ["rm", "stop"])
def test_an_end_asked_of_a_lost_host_is_noted_and_said(cli, on_h1, client, command):
    silence(client, "h1")
    done = cli(command, A)
    assert done.returncode == 1
    assert "host h1 is not up; it undoes them once it is back" in done.stderr
    (wish,) = (one for one in on_h1.wishes_on("h1") if one.container_id == A)
    assert wish.is_removed if command == "rm" else wish.stop_grace_s is not None


def test_a_wait_says_for_which_host_it_waits(cli, on_h1, client):
    silence(client, "h1")
    done = cli("wait", A, B, "--timeout", "0.1")
    assert done.returncode == 1
    assert "host h1 is lost since" in done.stderr
    assert "2 sandboxes waited for, until it returns" in done.stderr


def test_a_wait_sees_the_host_return_though_no_state_has_moved(on_h1, client, heartbeat, monkeypatch, capsys):
    """The host reports what was recorded before: that is no event."""
    monkeypatch.setattr("cli.away.LOOK_S", 0)
    away = Away(on_h1, follows=True)
    states = away.begin([A, B])
    assert states == {A: "running", B: "placed"}
    silence(client, "h1")
    assert away.look(states)
    assert states == {A: "unknown", B: "unknown"}
    assert not away.look(states)
    heartbeat("h1", pulls=True)
    assert away.look(states)
    assert states == {A: "running", B: "placed"}
    assert capsys.readouterr().err.count("is lost since") == 1, "said once, not at each look"


def test_rm_of_a_host_takes_all_that_it_has(cli, on_h1):
    on_h1.enqueue("b-2", [("sb-00000000000000c1", SPEC)])
    done = cli("rm", "--host", "h1", "--no-wait")
    assert done.stdout.split() == [A, B]
    assert cli("rm", "--host", "h1", "--all").returncode == 2


# -- forgotten -------------------------------------------------------------------------------------


def test_a_live_host_cannot_be_forgotten(cli, on_h1):
    done = cli("hosts", "--forget", "h2")
    assert done.returncode == 2
    assert "the host is up" in done.stderr
    assert "h2" in on_h1.all_hosts()


def test_a_host_is_forgotten_with_all_that_is_kept_of_it(cli, record, heartbeat, client):
    heartbeat("h1", pulls=True)
    record.drain("h1", True)
    record.leave("h1")
    assert cli("hosts", "--forget", "h1").stdout == "h1\n"
    assert record.all_hosts() == {}
    assert [key for key in client.keys("*") if "h1" in key] == []
    assert record.drain_of("h1") is None


def test_sandboxes_of_a_forgotten_host_have_failed_if_one_insists(cli, on_h1, client):
    silence(client, "h1")
    refused = cli("hosts", "--forget", "h1")
    assert refused.returncode == 2
    assert "2 sandboxes are there" in refused.stderr
    assert "--force" in refused.stderr
    done = cli("hosts", "--forget", "h1", "--force")
    assert done.returncode == 0
    assert f"{A} counts as failed" in done.stderr
    row = on_h1.get(A)
    assert (row["state"], row["reason"]) == ("failed", "lost")
    assert row["error"]["message"] == "host h1 was lost, and is forgotten"
    assert on_h1.batch("b-1")["outcome"] == "failed"
    assert on_h1.ended([A, B]) == [A, B], "it undoes them, should it come back"


# -- why they wait, before and after ---------------------------------------------------------------


def test_ls_and_show_say_why_a_sandbox_waits(cli, record, heartbeat):
    heartbeat("h1", pulls=True, capacity=1, labels={"zone": "a"})
    record.enqueue("b-1", [(A, SPEC), (B, SPEC)])
    assert take(record, "h1", capacity=1) == [A]
    rows = {row["id"]: row for row in cli.json("ls")}
    assert (rows[A]["why"], rows[B]["why"]) == (None, "host h1 is full (1 of 1)")
    assert cli("ls").stdout.splitlines()[2].endswith("host h1 is full (1 of 1)")
    assert cli.json("show", B)["why"] == "host h1 is full (1 of 1)"
    assert "host h1 is full (1 of 1)" in cli("show", B).stdout


def test_thousands_that_wait_for_the_same_are_judged_once(cli, record, heartbeat, monkeypatch):
    """`ls` of ten thousand has half a second."""
    asked = []
    monkeypatch.setattr("tasks.whys.why", lambda need, hosts: asked.append(need) or "because")
    heartbeat("h1", pulls=True)
    record.enqueue("b-1", [(f"sb-{number:016x}", SPEC) for number in range(2000)])
    assert cli("ls").stdout.count("because") == 2000
    assert len(asked) == 1


def test_labels_that_no_host_has_are_refused(cli, record, heartbeat):
    heartbeat("h1", labels={"zone": "a"})
    heartbeat("h2", labels={"zone": "b", "gpu": "true"})
    done = cli("run", "--on", "gpu=false", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert LINE.match(done.stderr)
    assert "--on gpu=false" in done.stderr
    assert "known: gpu=true, zone=a, zone=b" in done.stderr
    both = cli("run", "--on", "gpu=true", "--on", "zone=a", "--", "true")
    assert both.returncode == 2, "no host has both"
    assert record.ids() == []
    assert cli("run", "--on", "gpu=true", "--", "true").returncode == 0


@pytest.mark.parametrize("options", [("--host", "h1"), ("--on", "gpu=true")])
def test_a_host_that_takes_nothing_now_is_known_and_warned_of(cli, record, heartbeat, client, options):
    heartbeat("h1", labels={"gpu": "true"})
    heartbeat("h2")
    silence(client, "h1")
    done = cli("run", *options, "--", "true")
    assert done.returncode == 0, done.stderr
    assert "it waits as queued: host h1 is lost since" in done.stderr
    heartbeat("h1", labels={"gpu": "true"})
    assert "it waits" not in cli("run", *options, "--", "true").stderr
    record.drain("h1", True, "new disk")
    assert "it waits as queued: host h1 is drained: new disk" in cli("run", *options, "--", "true").stderr


@pytest.mark.parametrize("options", [("--host", "h1"), ("--on", "gpu=true")])
def test_without_any_host_none_is_known(cli: CommandLine, record: Record, options: tuple[str, str]) -> None:
    done = cli("run", *options, "--", "true")
    assert done.returncode == 2
    assert "known: none" in done.stderr
    assert record.ids() == []
