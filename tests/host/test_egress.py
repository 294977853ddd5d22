"""Egress policy and isolation, seen from inside real sandboxes."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.host.probes import COMMAND, echo_servers, echoes, launch, outside, reach, run, targets
from tests.host.system import System
from worker import nft
from worker.egress_rules import Link, load_text, ruleset

ORPHAN = "sb-00000000000000bb"


@pytest.fixture(scope="module")
def internet(system: System) -> Iterator[str]:
    with outside("sbtout", "198.51.100") as address:
        yield address


@pytest.fixture
def gateway(clean_system: System) -> str:
    return clean_system.subnet.replace("0/24", "1")


def test_deny_closes_every_way_out_and_lets_replies_pass(clean_system: System, internet: str, gateway: str):
    """Host, sibling and internet: what an open sandbox reaches, a denied one does not."""
    _, open_ip = launch(clean_system)
    denied, ip = launch(clean_system, "--egress", "deny")
    with echo_servers(gateway):
        everywhere = [*targets(gateway), *targets(internet)]
        assert reach(open_ip, [*everywhere, *targets(ip)]) == [True] * 6, "a denied one still answers"
        assert reach(ip, [*everywhere, *targets(open_ip)]) == [False] * 6
    assert [echoes(one) for one in targets(ip)] == [True, True], "the host's own questions are answered"
    assert clean_system.audit() == []

    shown = clean_system.show(denied)
    assert (shown["egress"], shown["isolate"]) == ([], False)
    assert "egress" in [run["name"] for run in shown["stages"]]
    rules = run("nft", "list", "chain", "bridge", "sandbatch", f"{denied}-eth0-from")
    assert " counter packets 0 " not in rules.splitlines()[-3], "an operator sees what was denied"

    clean_system.cli("rm", "--all")
    assert "sandbatch" not in run("nft", "list", "tables").split(), "the tables go with the last sandbox"


def test_what_is_allowed_is_open_and_nothing_beside_it(clean_system: System, internet: str, gateway: str):
    """Address, port and protocol each count."""
    _, sibling = launch(clean_system)
    rules = f"{internet}:8001,{sibling}/32:5353/udp,{gateway}:8002-8003"
    _, ip = launch(clean_system, "--egress", rules)
    with echo_servers(gateway):
        allowed = [("tcp", internet, 8001), ("udp", sibling, 5353), ("tcp", gateway, 8002)]
        assert reach(ip, allowed) == [True] * 3
        others = [("tcp", internet, 8002), ("udp", internet, 5353), ("tcp", sibling, 8001)]
        others += [("tcp", gateway, 8001), ("udp", gateway, 5353)]
        assert reach(ip, others) == [False] * 5


def test_isolated_sandboxes_are_kept_from_their_siblings_both_ways(
    clean_system: System, internet: str, gateway: str
):
    """Host and internet stay in reach, and the host reaches them."""
    _, sibling = launch(clean_system)
    _, ip = launch(clean_system, "--isolate")
    _, twin = launch(clean_system, "--isolate")
    with echo_servers(gateway):
        others = [*targets(sibling), *targets(twin)]
        assert reach(ip, [*targets(gateway), *targets(internet), *others]) == [True] * 4 + [False] * 4
        assert reach(sibling, targets(ip)) == [False, False]
        assert reach(sibling, targets(gateway)) == [True, True]
    assert [echoes(one) for one in targets(ip)] == [True, True]


def test_a_published_port_answers_and_every_link_is_held(clean_system: System):
    """Two networks, a policy for both; who comes through the host's port gets replies."""
    bridge = json.loads((clean_system.conf_dir / "bridged.conflist").read_text())
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    published = {**bridge, "name": "published", "plugins": [*bridge["plugins"], portmap]}
    (clean_system.conf_dir / "published.conflist").write_text(json.dumps(published))
    second = json.loads(json.dumps(bridge).replace(clean_system.bridge, "sbtsecond"))
    second["name"], second["plugins"][0]["ipam"]["subnet"] = "second", "10.147.0.0/24"
    (clean_system.conf_dir / "second.conflist").write_text(json.dumps(second))
    try:
        nets = ("--network", "published", "--network", "second", "--publish", "18148:8000")
        container_id, ip = launch(clean_system, *nets, "--egress", "deny")
        own = clean_system.subnet.replace("0/24", "1")
        with echo_servers(own), echo_servers("10.147.0.1"):
            tried = [*targets(own), *targets("10.147.0.1")]
            assert reach(ip, tried) == [False] * 4
            with outside("sbtcome", "198.51.101") as other:
                script = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read())"
                url = "http://198.51.101.1:18148/"
                page = run("ip", "netns", "exec", "sbtcome", "python3", "-c", script, url)
                assert page.strip() == "b'ready'"
                assert reach(ip, targets(other)) == [False, False]
        text = run("nft", "list", "map", "bridge", "sandbatch", "from_link")
        assert {f"{container_id}-{link}-from" for link in ("eth0", "eth1")} <= set(
            text.replace(",", " ").split()
        )
        assert clean_system.audit() == []
    finally:
        clean_system.cli("rm", "--all")
        subprocess.run(["ip", "link", "del", "sbtsecond"], check=False, capture_output=True)


def test_a_network_without_a_bridge_has_its_policy_too(clean_system: System, internet: str):
    """ptp: each sandbox has a link of its own to the host, and reaches the others through it."""
    plugin = {"type": "ptp", "ipMasq": True, "ipam": ptp_addresses(clean_system)}
    document = {"cniVersion": "1.0.0", "name": "ptp", "plugins": [plugin]}
    (clean_system.conf_dir / "ptp.conflist").write_text(json.dumps(document))
    _, sibling = launch(clean_system, "--network", "ptp")
    _, ip = launch(clean_system, "--network", "ptp", "--egress", f"{internet}:8001")
    _, apart = launch(clean_system, "--network", "ptp", "--isolate")

    assert reach(ip, [*targets(internet), *targets(sibling)]) == [True, False, False, False]
    assert reach(sibling, [*targets(ip), *targets(apart)]) == [True, True, False, False]
    assert reach(apart, [*targets(internet), *targets(sibling)]) == [True, True, False, False]
    assert [echoes(one) for one in targets(ip)] == [True, True]
    assert clean_system.audit() == []


def ptp_addresses(system: System) -> dict[str, object]:
    return {
        "type": "host-local",
        "subnet": "10.149.0.0/24",
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(system.folder / "cni" / "networks"),
    }


def test_a_network_past_the_host_is_refused_before_anything_is_made(clean_system: System):
    """A policy that holds nothing back must not look like one."""
    plugin = {"type": "macvlan", "master": clean_system.bridge, "ipam": {"type": "static"}}
    document = {"cniVersion": "1.0.0", "name": "past", "plugins": [plugin]}
    (clean_system.conf_dir / "past.conflist").write_text(json.dumps(document))
    (container_id,) = clean_system.run("--network", "past", "--egress", "deny", "--", "true")
    assert clean_system.wait([container_id], "terminal") == {container_id: "failed"}
    error = clean_system.show(container_id)["error"]
    assert "plugin macvlan leaves no end of a link on the host" in error["message"]
    assert error["stage"] == "netns"


def test_a_policy_that_somebody_took_away_is_missing_and_can_be_loaded_again(
    clean_system: System, internet: str
):
    """That a sandbox runs open is no clean audit."""
    container_id, ip = launch(clean_system, "--egress", "deny")
    run("nft", "flush", "chain", "bridge", "sandbatch", f"{container_id}-eth0-from")
    assert clean_system.audit() == [f"missing egress policy of {container_id}"]
    assert reach(ip, targets(internet)) == [True, True]
    rows = json.loads(clean_system.cli("audit", "--mend", "--json").stdout)
    assert [(row["name"], row["mended"]) for row in rows] == [(f"policy of {container_id}", True)]
    assert clean_system.audit() == []
    assert reach(ip, targets(internet)) == [False, False]
    run("nft", "delete", "table", "bridge", "sandbatch")
    clean_system.cli("rm", container_id)  # the undo finds nothing, and that is fine
    assert nft.held().tables == set()


def test_what_a_firewalls_reload_flushed_the_worker_loads_again(clean_system: System, internet: str):
    """Also where the next sandbox has made the shared tables anew by then."""
    container_id, ip = launch(clean_system, "--egress", "deny")
    clean_system.wait_until(lambda: clean_system.audit() == [], 20, "clean audit")
    for _ in range(2):
        for table in ("bridge", "inet"):
            run("nft", "delete", "table", table, "sandbatch")
        other, _ = launch(clean_system, "--egress", "deny")
        clean_system.wait_until(lambda: clean_system.audit() == [], 20, f"policy of {container_id} again")
        assert reach(ip, targets(internet)) == [False, False]
        clean_system.cli("rm", other)
    assert clean_system.show(container_id)["state"] == "running"


def test_rules_without_a_sandbox_are_extra_and_mended(clean_system: System):
    """Beside a policy in use, which stays as it is."""
    container_id, _ = launch(clean_system, "--egress", "deny")
    before = nft.held()
    link = Link("eth0", "veth0a0b0c0d", "none", "02:00:00:00:00:01", ("192.0.2.2/24",), ())
    nft.load(load_text(ruleset(ORPHAN, [link], [], True)))
    found = clean_system.audit()
    assert {line.split(" ")[0] for line in found} == {"extra"}
    assert all(f" sandbatch {ORPHAN}-eth0-" in line for line in found)
    rows = json.loads(clean_system.cli("audit", "--mend", "--json").stdout)
    assert all(row["mended"] for row in rows)
    assert nft.held() == before
    assert clean_system.ls()[container_id]["state"] == "running"


def test_shared_tables_that_nobody_uses_are_extra_and_mended(clean_system: System):
    """As a flush by hand of one sandbox's chains, and then its end, would leave them."""
    subprocess.run(["nft", "add", "table", "bridge", "sandbatch"], check=True)
    assert clean_system.audit() == ["extra egress table bridge sandbatch"]
    clean_system.cli("audit", "--mend")
    assert nft.held().tables == set()


@pytest.mark.timeout(300)
def test_a_worker_killed_around_the_load_leaves_no_rules(make_system):
    """The new worker finds the policy by its intent alone, or that half of the removal is done."""
    system = make_system(SANDBATCH_ALLOW_FAULTS="1")
    system.start(SANDBATCH_FAULTS="nft.load.after:kill")  # loaded, and not journaled
    (container_id,) = system.run("--egress", "deny", *COMMAND)
    system.wait_for_end()
    assert nft.held().chains, "the rules are there"

    # Of the loads of this worker two undo the first attempt, the third is the second's; the fourth removes
    # it, and at the fifth the shared tables are still there.
    system.start(SANDBATCH_FAULTS="nft.load.before:kill:5")
    assert system.wait([container_id], "running") == {container_id: "running"}
    assert system.audit() == []
    system.cli("rm", "--no-wait", container_id)
    system.wait_for_end()
    assert system.audit() != []

    system.start()
    assert system.wait([container_id], "terminal") == {container_id: "exited"}
    assert system.audit() == []
    assert nft.held().tables == set()
