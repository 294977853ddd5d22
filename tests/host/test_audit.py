"""The audit names what was added or taken away by hand, and nothing else."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host.system import SERVER, System
from worker import procs
from worker.audit import chain_name
from worker.spec import new_container_id

STRANGER = "sb-00000000000000aa"


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def sandbox(clean_system: System) -> dict[str, str]:
    """A running sandbox, and a clean audit before the test touches anything."""
    (container_id,) = clean_system.run("--wait", *SERVER)
    assert clean_system.audit() == []
    return clean_system.show(container_id)


def host_end(container_id: str) -> str:
    """The host's end of the sandbox's veth pair."""
    peer = sh("ip", "-n", container_id, "-o", "link", "show", "eth0").split("@if")[1].split(":")[0]
    return next(line.split(": ")[1].split("@")[0] for line in sh("ip", "-o", "link").splitlines()
                if line.startswith(f"{peer}: "))  # fmt: skip


def leases(system: System) -> Path:
    return system.folder / "cni" / "networks" / "bridged"


def add_netns(system: System) -> Callable[[], object]:
    sh("ip", "netns", "add", STRANGER)
    return lambda: sh("ip", "netns", "del", STRANGER)


def add_lease(system: System) -> Callable[[], object]:
    lease = leases(system) / f"{system.subnet.removesuffix('.0/24')}.77"
    lease.write_text(f"{STRANGER}\r\neth0")
    return lease.unlink


def add_veth(system: System) -> Callable[[], object]:
    sh("ip", "link", "add", "vethdeadbeef", "type", "veth", "peer", "name", "sbtpeer")
    sh("ip", "link", "set", "vethdeadbeef", "master", system.bridge)
    return lambda: sh("ip", "link", "del", "vethdeadbeef")


def add_chain(system: System) -> Callable[[], object]:
    chain = chain_name("bridged", STRANGER)
    sh("iptables", "-t", "nat", "-N", chain)
    return lambda: sh("iptables", "-t", "nat", "-X", chain)


def add_cache_entry(system: System) -> Callable[[], object]:
    entry = next((system.folder / "cni" / "results").iterdir())
    copy = entry.with_name(f"bridged-{STRANGER}-eth0")
    copy.write_text(
        entry.read_text().replace(entry.name.split("-eth0")[0].removeprefix("bridged-"), STRANGER)
    )
    return copy.unlink


def add_folder(system: System) -> Callable[[], object]:
    folder = system.sandboxes / STRANGER
    folder.mkdir()
    return folder.rmdir


def add_exit_file(system: System) -> Callable[[], object]:
    path = system.run_dir / "exits" / STRANGER
    path.write_text("0")
    return path.unlink


def add_process(system: System) -> Callable[[], object]:
    """A runsc that no journal knows: by its command line it is one of ours."""
    words = [f"--root={system.run_dir}/runsc", "boot", STRANGER]
    process = subprocess.Popen(["python3", "-c", "import time; time.sleep(600)", *words])

    def end() -> None:
        process.kill()
        process.wait()

    return end


@pytest.mark.parametrize(
    ("add", "kind", "name"),
    [
        (add_netns, "netns", STRANGER),
        (add_lease, "lease", ".77"),
        (add_veth, "veth", "vethdeadbeef"),
        (add_chain, "nat chain", chain_name("bridged", STRANGER)),
        (add_cache_entry, "cni cache", STRANGER),
        (add_folder, "folder", STRANGER),
        (add_exit_file, "exit file", STRANGER),
        (add_process, "process", "sandbox"),
    ],
)
def test_what_is_added_is_named(
    clean_system: System,
    sandbox: dict[str, str],
    add: Callable[[System], Callable[[], object]],
    kind: str,
    name: str,
):
    """An object of ours without a journal is a leak."""
    take_away = add(clean_system)
    try:
        found = clean_system.audit()
    finally:
        take_away()
    assert len(found) == 1
    assert found[0].startswith(f"extra {kind} ")
    assert name in found[0]


def test_a_netns_taken_away_is_named(clean_system: System, sandbox: dict[str, str]):
    """The sandbox lives on in it, but nobody finds it any more; rm still leaves nothing."""
    sh("umount", f"/var/run/netns/{sandbox['id']}")
    os.unlink(f"/var/run/netns/{sandbox['id']}")
    assert f"missing netns {sandbox['id']}" in clean_system.audit()


def test_a_lease_taken_away_is_named(clean_system: System, sandbox: dict[str, str]):
    """Its address could be given away twice."""
    (leases(clean_system) / sandbox["ip"]).unlink()
    assert clean_system.audit() == [f"missing lease {leases(clean_system) / sandbox['ip']}"]


def test_a_veth_taken_away_is_named(clean_system: System, sandbox: dict[str, str]):
    """The sandbox is cut off."""
    veth = host_end(sandbox["id"])
    sh("ip", "link", "del", veth)
    assert clean_system.audit() == [f"missing veth {veth}"]


def test_a_masquerade_chain_taken_away_is_named(clean_system: System, sandbox: dict[str, str]):
    """The sandbox reaches nothing beyond the host."""
    chain = chain_name("bridged", sandbox["id"])
    for rule in sh("iptables-save", "-t", "nat").splitlines():
        if rule.startswith("-A POSTROUTING") and chain in rule:
            subprocess.run(f"iptables -t nat -D {rule[3:]}", shell=True, check=True)  # noqa: S602 - its own quoting
    sh("iptables", "-t", "nat", "-F", chain)
    sh("iptables", "-t", "nat", "-X", chain)
    assert clean_system.audit() == [f"missing nat chain {chain}"]


def test_a_killed_sentry_is_an_end_like_any_other(clean_system: System, sandbox: dict[str, str]):
    """Its conmon says so, and the undos follow."""
    os.kill(process_of(clean_system, sandbox["id"], "sandbox"), signal.SIGKILL)
    assert clean_system.wait([sandbox["id"]], "terminal") == {sandbox["id"]: "exited"}
    assert clean_system.show(sandbox["id"])["exit_code"] == 137
    assert clean_system.audit() == []


def test_one_that_is_killed_with_its_conmon_has_failed(clean_system: System, sandbox: dict[str, str]):
    """Nobody writes its exit code: the next look at the processes finds it."""
    for role in ("conmon", "sandbox"):
        os.kill(process_of(clean_system, sandbox["id"], role), signal.SIGKILL)
    assert clean_system.wait([sandbox["id"]], "terminal") == {sandbox["id"]: "failed"}
    assert "killed from outside" in clean_system.show(sandbox["id"])["error"]["message"]
    assert clean_system.audit() == []


def process_of(system: System, container_id: str, role: str) -> int:
    found = procs.processes_of(system.run_dir / "runsc", container_id)
    return next(one.pid for one in found if one.role == role)


def test_objects_of_others_are_not_findings(clean_system: System, sandbox: dict[str, str]):
    """A netns, a veth on another bridge and a chain with another's id are none of our business."""
    other = "other-" + new_container_id()[3:9]
    sh("ip", "netns", "add", other)
    sh("ip", "link", "add", "sbtother", "type", "bridge")
    sh("ip", "link", "add", "vethfeedbeef", "type", "veth", "peer", "name", "sbtpeer")
    sh("ip", "link", "set", "vethfeedbeef", "master", "sbtother")
    sh("iptables", "-t", "nat", "-N", "CNI-0123456789abcdef01234567")
    comment = 'name: "podman" id: "0123"'
    rule = ("CNI-0123456789abcdef01234567", "-m", "comment", "--comment", comment, "-j", "ACCEPT")
    sh("iptables", "-t", "nat", "-A", *rule)
    try:
        assert clean_system.audit() == []
    finally:
        sh("iptables", "-t", "nat", "-F", rule[0])
        sh("iptables", "-t", "nat", "-X", rule[0])
        sh("ip", "link", "del", "vethfeedbeef")
        sh("ip", "link", "del", "sbtother")
        sh("ip", "netns", "del", other)
