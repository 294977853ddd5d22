"""The verbs of the harness do what happens to real machines, and leave nothing on this one."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.host.machine import difference, snapshot
from tests.hosts.fleet import BROKER_ADDRESS, BROKER_PORT, Fleet
from tests.hosts.host import REPO
from worker import limits
from worker.journal import boot_id

# Fetches what it has sent to the broker, twice 32 KiB, and says how long that took.
ECHO = """
import os, redis, time
client = redis.Redis.from_url(os.environ["SANDBATCH_BROKER_URL"])
client.ping()
began = time.monotonic()
client.echo(bytes(32 << 10))
print(time.monotonic() - began)
"""


def boot_id_on(fleet: Fleet, name: str) -> str:
    code = "from worker.journal import boot_id; print(boot_id())"
    host = fleet.hosts[name]
    return host.on().run(sys.executable, "-c", code, env=host.environment).stdout.strip()


def echo_s(fleet: Fleet, name: str) -> float:
    host = fleet.hosts[name]
    return float(host.on().run(sys.executable, "-c", ECHO, env=host.environment).stdout)


def reaches_the_broker(fleet: Fleet, name: str) -> bool:
    code = f"import socket; socket.create_connection(('{BROKER_ADDRESS}', {BROKER_PORT}), timeout=1)"
    return fleet.hosts[name].on().run(sys.executable, "-c", code, check=False).returncode == 0


def test_hosts_have_nothing_in_common_but_the_broker(clean_fleet):
    """Each has its netns, links, addresses, processes and cgroups, with the same names as the others."""
    fleet = clean_fleet
    ids = [
        fleet.run("--host", name, "--memory", "64m", "--wait", "--", "sleep", "300")[0]
        for name in fleet.hosts
    ]
    assert fleet.live() == dict.fromkeys(fleet.hosts, 1)
    for own, host in zip(ids, fleet.hosts.values(), strict=True):
        netns = host.on().run("ls", "/run/netns").stdout.split()
        words = host.on().run("ps", "-ww", "-eo", "args").stdout
        assert (netns, host.journals()) == ([own], [own])
        assert [one for one in ids if one in words] == [own]
        assert {path.name for path in limits.list_cgroups([host.cgroup_parent])} <= {own}
    rows = fleet.rows()
    assert len({rows[one]["ip"] for one in ids}) == 1, "each host has the same subnet"
    assert len({boot_id(), *(boot_id_on(fleet, name) for name in fleet.hosts)}) == 4
    assert fleet.audits() == []


def test_a_reboot_ends_its_sandboxes_and_keeps_its_disk(clean_fleet):
    """Journals and leases are on the disk; netns, links, processes and /run are not."""
    fleet, host = clean_fleet, clean_fleet.hosts["h1"]
    ids = fleet.run("--count", "3", "--host", "h1", "--memory", "64m", "--wait", "--", "sleep", "300")
    fleet.run("--host", "h2", "--wait", "--", "sleep", "300")
    old = boot_id_on(fleet, "h1")
    fleet.kill("h1")
    assert (fleet.live(), host.journals()) == ({"h1": 0, "h2": 1, "h3": 0}, sorted(ids))
    assert list(limits.list_cgroups([host.cgroup_parent])) == []

    fleet.boot("h1")

    assert boot_id_on(fleet, "h1") not in (old, boot_id())
    assert set(fleet.wait(ids, "terminal").values()) == {"failed"}
    rows = fleet.rows()
    assert {rows[one]["error"]["message"] for one in ids} == {"host rebooted"}
    assert (host.journals(), fleet.audits()) == ([], [])
    fleet.run("--host", "h1", "--wait", "--", "sleep", "300")


def test_a_killed_worker_leaves_its_sandboxes_and_the_next_one_has_them(clean_fleet):
    fleet = clean_fleet
    (one,) = fleet.run("--host", "h1", "--ttl", "300", "--wait", "--", "sleep", "300")
    fleet.kill_worker("h1")
    assert fleet.live()["h1"] == 1
    assert fleet.audits("h1") == [], "an audit needs no worker"
    fleet.start_worker("h1")
    assert fleet.wait([one], "running") == {one: "running"}
    fleet.stop_worker("h1")
    assert fleet.live()["h1"] == 1
    fleet.start_worker("h1")


def test_a_cut_host_goes_on_and_tells_when_it_is_joined_again(clean_fleet):
    """Its clock and its sandboxes need no broker; the others take the work meanwhile."""
    fleet = clean_fleet
    (short,) = fleet.run("--host", "h1", "--wait", "--", "sh", "-c", "sleep 2; exit 3")
    fleet.cut("h1")
    (waiting,) = fleet.run("--host", "h1", "--", "sleep", "300")
    fleet.wait_until(lambda: fleet.live()["h1"] == 0, 20, "end of a sandbox on a cut host")
    assert not reaches_the_broker(fleet, "h1")
    assert reaches_the_broker(fleet, "h2")
    others = fleet.run("--count", "4", "--wait", "--", "sleep", "300")
    rows = fleet.rows()
    assert {rows[one]["host"] for one in others} <= {"h2", "h3"}
    assert (rows[short]["state"], rows[waiting]["state"]) == ("running", "queued")

    fleet.join("h1")

    assert fleet.wait([short], "terminal") == {short: "exited"}
    assert fleet.rows()[short]["exit_code"] == 3
    assert fleet.wait([waiting], "running") == {waiting: "running"}


def test_a_slow_cable_slows_what_goes_through_it_until_it_is_fast_again(clean_fleet):
    fleet = clean_fleet
    usual_s = echo_s(fleet, "h1")
    fleet.slow("h1", rate="256kbit")
    slow_s, other_s = echo_s(fleet, "h1"), echo_s(fleet, "h2")
    fleet.fast("h1")
    assert slow_s > 1 > max(usual_s, other_s, echo_s(fleet, "h1"))
    try:
        fleet.slow("h1", delay="150ms", loss="0.1%")
    except NotImplementedError as error:  # not every kernel has it
        assert "CONFIG_NET_SCH_NETEM" in str(error)  # noqa: PT017 - it may as well not be raised
        assert echo_s(fleet, "h1") < 1, "the cable is as it was"
    else:
        assert echo_s(fleet, "h1") > 0.3
        fleet.fast("h1")


def test_a_fleet_that_does_not_start_leaves_nothing(fleet_parts, tmp_path):
    before = snapshot()
    with (
        pytest.raises(AssertionError, match="setting slots"),
        Fleet(tmp_path / "fleet", 2, SANDBATCH_SLOTS="many"),
    ):
        pytest.fail("it has started")
    assert difference(before, snapshot()) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_make_fleet_takes_commands_and_leaves_nothing_however_it_ends(fleet_parts, tmp_path, blow):
    """The prompt is for people; hosts must not outlive it, also when nobody could clean up."""
    before = snapshot()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hosts", "--hosts", "2"],
        cwd=REPO, env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as prompt:  # fmt: skip
        assert prompt.stdin is not None
        assert prompt.stdout is not None
        _until_prompt(prompt.stdout)
        answers = {}
        for line in (
            "run --count 2 --wait -- sleep 300",
            "live",
            "audit",
            "on 2 hostname",
            "cut 9",
            "no-such",
        ):
            prompt.stdin.write(f"{line}\n".encode())
            prompt.stdin.flush()
            answers[line] = _until_prompt(prompt.stdout)
        assert sum(int(word) for word in answers["live"].split()[1::2]) == 2
        assert (answers["audit"], answers["on 2 hostname"]) == ("clean\n", "h2\n")
        assert "there are h1, h2" in answers["cut 9"]
        handles = [os.pidfd_open(pid) for pid in _inits(prompt.pid)]
        assert len(handles) == 3, "control and two hosts"
        prompt.send_signal(blow)
        for handle in handles:
            assert select.select([handle], [], [], 20)[0], "a host outlives the harness"
            os.close(handle)
        assert prompt.wait(20) == (0 if blow == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left := difference(before, snapshot()):  # of a killed one others have to reap
        assert time.monotonic() < deadline, left
    assert [one for one in tmp_path.iterdir() if blow == signal.SIGINT] == []


def _until_prompt(stream) -> str:
    """What it prints until it asks."""
    text = b""
    while not text.endswith(b"fleet> "):
        more = os.read(stream.fileno(), 65536)
        assert more, text.decode()
        text += more
    return text.removesuffix(b"fleet> ").decode()


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _inits(harness: int) -> list[int]:
    """The first processes of its boxes: children of its `unshare`s."""
    holders = [pid for pid in _children(harness) if b"unshare" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [init for holder in holders for init in _children(holder)]
