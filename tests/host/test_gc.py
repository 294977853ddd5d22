"""What dead sandboxes hold on our networks goes when a worker starts; nothing else does."""

import json
import subprocess
import sys

import pytest

from tests.host.machine import snapshot
from tests.host.system import SERVER, System
from worker.journal import FILE

GC = "import sys; from worker import gc, settings; sys.exit(len(gc.collect(settings.load_settings())))"


def collect(system: System) -> None:
    """What a worker does before it takes its first message."""
    subprocess.run([sys.executable, "-c", GC], env=system.environment, check=True)


@pytest.fixture
def system(make_system) -> System:
    made: System = make_system()
    made.start()
    return made


def end_processes_of(system: System, container_id: str) -> None:
    """As a reboot does it: the sandbox is gone, what is on disk stays."""
    code = (
        "import sys; from worker import procs, settings\n"
        "root = settings.load_settings().runsc_root\n"
        "sys.exit(len(procs.end(procs.processes_of(root, sys.argv[1]), timeout_s=10)))"
    )
    subprocess.run([sys.executable, "-c", code, container_id], env=system.environment, check=True)


def test_an_attachment_without_journal_is_collected_and_the_others_stay(system):
    """Address, rules and cache entry of the dead one go; the living one keeps all of its own."""
    dead, living = system.run("--count", "2", "--wait", *SERVER)
    system.stop()
    end_processes_of(system, dead)
    (system.sandboxes / dead / FILE).unlink()
    (system.sandboxes / dead / "container.log").unlink()
    for file in (system.sandboxes / dead / "bundle").iterdir():
        file.unlink()
    (system.sandboxes / dead / "bundle").rmdir()
    (system.sandboxes / dead).rmdir()
    kinds = {line.split(" ")[1] for line in system.audit()}
    assert {"cni", "lease", "nat"} <= kinds

    collect(system)

    assert not [line for line in system.audit() if line.split(" ")[1] in ("cni", "lease", "nat", "veth")]
    system.start()
    assert system.ls()[living]["state"] == "running"
    outcomes = json.loads(system.cli("audit", "--mend", "--json").stdout)  # its netns and exit file
    assert {row["kind"] for row in outcomes} <= {"netns", "exit file", "runsc state", "process"}
    assert system.audit() == []


def test_a_network_that_another_runtime_is_on_is_not_collected(system):
    """One lease of podman's, and nothing on that network is touched."""
    (living,) = system.run("--wait", *SERVER)
    lease = system.folder / "cni/networks/bridged" / f"{system.subnet.removesuffix('.0/24')}.77"
    lease.write_text("0123456789abcdef\r\neth0")
    stale = lease.with_name(f"{system.subnet.removesuffix('.0/24')}.78")
    stale.write_text("sb-00000000000000dd\r\neth0")
    system.stop()
    before = snapshot()
    collect(system)
    assert snapshot() == before
    assert lease.exists()
    assert stale.exists()
    lease.unlink()
    stale.unlink()
    system.start()
    assert system.ls()[living]["state"] == "running"


def test_a_sandbox_whose_journal_cannot_be_read_keeps_its_network(system):
    """It runs: nothing is claimed about it until the operator mends it."""
    (bad,) = system.run("--wait", *SERVER)
    ip = system.show(bad)["ip"]
    system.stop()
    (system.sandboxes / bad / FILE).write_text("")
    collect(system)
    system.start()
    collect(system)
    url = f"http://{ip}:8000/"
    subprocess.run(
        [sys.executable, "-c", f"import urllib.request; urllib.request.urlopen('{url}', timeout=10)"],
        check=True,
    )
    assert json.loads(system.cli("audit", "--mend", "--json").stdout)
    assert system.audit() == []


def test_a_worker_collects_before_it_takes_work(system):
    """What a lost journal left on our network does not wait for an operator."""
    (living,) = system.run("--wait", *SERVER)
    system.stop()
    entry = system.folder / "cni" / "results" / f"bridged-{living}-eth0"
    stale = entry.with_name("bridged-sb-00000000000000dd-eth0")
    stale.write_text(entry.read_text().replace(living, "sb-00000000000000dd"))
    system.start()
    assert not stale.exists()
    assert entry.exists()
    assert system.audit() == []


def test_the_record_of_a_journal_that_cannot_be_read_is_failed(system):
    """Whoever asked for it learns that, and what the operator is to do."""
    (bad,) = system.run("--wait", *SERVER)
    system.stop()
    (system.sandboxes / bad / FILE).write_text("")
    system.start()
    assert system.wait([bad], "terminal") == {bad: "failed"}
    assert "journal unreadable: journal.jsonl.empty-" in system.show(bad)["error"]["message"]
    system.cli("audit", "--mend")
    assert system.audit() == []
