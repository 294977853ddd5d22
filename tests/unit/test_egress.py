"""The rules of a sandbox as text, and what is refused without a look at the machine."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from worker import doctor, egress, egress_audit, nft
from worker import journal as journals
from worker.egress_rules import (
    BASES,
    DENIED,
    Link,
    Ruleset,
    load_text,
    ruleset,
    unload_tables_text,
    unload_text,
)
from worker.errors import BadInput, HostNotReady
from worker.journal import Journal
from worker.spec import Spec, make_spec
from worker.stages import stages_of

ID = "sb-00000000000000aa"
BRIDGED = Link("eth0", "veth1", "br0", "02:00:00:00:00:01", ("10.1.0.2/24",), ("10.1.0.1/24",))
ROUTED = Link("eth1", "veth2", None, "02:00:00:00:00:02", ("10.2.0.2/24",), ("10.2.0.1/32",))
SIX = Link("eth0", "veth6", "br0", "02:00:00:00:00:06", ("fd00:1::2/64", "fe80::6/64"), ("fd00:1::1/64",))

# The whole of a denied sandbox on a bridge: who changes a rule sees here what else it changes.
DENIED_FROM = """\
ether type { 8021q, 8021ad } counter goto denied
ether saddr != 02:00:00:00:00:01 counter goto denied
arp saddr ether 02:00:00:00:00:01 arp saddr ip { 10.1.0.2 } accept
ip saddr != { 10.1.0.2 } counter goto denied
meta protocol ip6 counter goto denied
tcp flags & (syn|ack) != syn ip daddr . tcp sport @sb-00000000000000aa-eth0-tcp accept
ip daddr . udp dport . udp sport @sb-00000000000000aa-eth0-udp accept
icmp type echo-reply ip daddr . icmp id @sb-00000000000000aa-eth0-echo accept
counter goto denied
"""
DENIED_TO = """\
tcp flags & (syn|ack) == syn add @sb-00000000000000aa-eth0-tcp { ip saddr . tcp dport timeout 2m }
tcp flags & (syn|ack) != syn ip saddr . tcp dport @sb-00000000000000aa-eth0-tcp \
update @sb-00000000000000aa-eth0-tcp { ip saddr . tcp dport timeout 3h }
update @sb-00000000000000aa-eth0-udp { ip saddr . udp sport . udp dport timeout 3m }
icmp type echo-request update @sb-00000000000000aa-eth0-echo { ip saddr . icmp id timeout 30s }
"""


def rules(made: Ruleset, family: str, name: str) -> list[str]:
    return made.chains[family, f"{ID}-{name}"]


def test_a_denied_sandbox_on_a_bridge_has_these_rules() -> None:
    made = ruleset(ID, [BRIDGED], [], False)
    assert "\n".join(rules(made, "bridge", "eth0-from")) + "\n" == DENIED_FROM
    assert "\n".join(rules(made, "bridge", "eth0-to")) + "\n" == DENIED_TO
    assert rules(made, "inet", "eth0-stray") == ["counter goto denied"]
    assert len(made.chains) == 3
    assert made.elements == {
        ("bridge", "from_link", "veth1"): f"{ID}-eth0-from",
        ("bridge", "to_link", "veth1"): f"{ID}-eth0-to",
        ("inet", "from_link", "veth1"): f"{ID}-eth0-stray",
    }


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("1.1.1.1", ["ip daddr 1.1.1.1/32 accept"]),
        ("0.0.0.0/0", ["meta protocol ip accept"]),
        ("[::]/0/tcp", ["meta protocol ip6 meta l4proto tcp accept"]),
        ("10.0.0.0/8/udp", ["ip daddr 10.0.0.0/8 meta l4proto udp accept"]),
        (
            "10.0.0.0/8:443",
            [
                "ip daddr 10.0.0.0/8 tcp dport 443 accept",
                "ip daddr 10.0.0.0/8 meta l4proto tcp ip frag-off & 0x1fff != 0 accept",
            ],
        ),
        (
            "[fd00::]/8:50-60/udp",
            [
                "ip6 daddr fd00::/8 udp dport 50-60 accept",
                "ip6 daddr fd00::/8 meta l4proto udp frag frag-off != 0 accept",
            ],
        ),
    ],
)
def test_a_rule_is_an_accept_between_replies_and_the_refusal(rule: str, lines: list[str]) -> None:
    made = rules(ruleset(ID, [BRIDGED], [rule, rule], False), "bridge", "eth0-from")
    assert made[-1 - len(lines) :] == [*lines, "counter goto denied"]
    assert len(made) == DENIED_FROM.count("\n") + len(lines), "twice the same rule is one"


def test_a_link_without_a_bridge_has_its_rules_in_the_inet_table() -> None:
    """There is no frame to look at: what it sends comes straight to the host's IP stack."""
    made = ruleset(ID, [ROUTED], [], True)
    assert made.families == ["inet"]
    assert not [line for lines in made.chains.values() for line in lines if "ether" in line or "arp" in line]
    assert {name for _, name, _ in made.elements} == {"from_link", "to_link"}


def test_isolation_alone_refuses_only_the_subnet_but_the_host() -> None:
    made = ruleset(ID, [BRIDGED], None, True)
    refusal = "ip {} 10.1.0.0/24 ip {} != {{ 10.1.0.1 }} counter goto denied"
    assert rules(made, "bridge", "eth0-from") == [refusal.format("daddr", "daddr")]
    assert rules(made, "bridge", "eth0-to") == [refusal.format("saddr", "saddr")]
    assert made.elements["bridge", "apart", "veth1"] == f"{ID}-eth0-apart"
    assert not made.sets


def test_ipv6_may_look_for_its_neighbours_and_say_nothing_else_that_is_routed() -> None:
    """A neighbour solicitation to a far address would be routed there, with data in it."""
    made = rules(ruleset(ID, [SIX], [], True), "bridge", "eth0-from")
    (looks,) = [line for line in made if "nd-neighbor-solicit" in line]
    assert looks.startswith("ip6 daddr { fd00:1::/64, fe80::/10, ff02::/16 } icmpv6 type {")
    refused = "ip6 daddr fd00:1::/64 ip6 daddr != { fd00:1::1 } counter goto denied"
    assert made.index(refused) < made.index(looks), "an isolated one does not look for its siblings"
    assert "meta protocol ip counter goto denied" in made


def test_each_link_of_a_sandbox_has_its_policy() -> None:
    made = ruleset(ID, [BRIDGED, ROUTED], [], False)
    assert {link for _, _, link in made.elements} == {"veth1", "veth2"}
    assert made.families == ["bridge", "inet"]


def test_what_is_loaded_is_what_is_removed() -> None:
    """Each object that is added by the sandbox's name is deleted by it, users before what they use."""
    made = ruleset(ID, [BRIDGED, ROUTED, SIX], ["1.1.1.1:53/udp"], True)
    added = re.findall(rf"^add (chain|set) (\w+) sandbatch ({ID}\S+)", load_text(made), re.MULTILINE)
    deleted = re.findall(rf"^delete (chain|set) (\w+) sandbatch ({ID}\S+)", unload_text(made), re.MULTILINE)
    assert sorted(added) == sorted(deleted)
    kinds = [line.split(" ")[1] for line in unload_text(made).splitlines()]
    assert kinds == sorted(kinds, key=["element", "chain", "set"].index)


def test_no_rule_is_added_to_what_was_not_flushed() -> None:
    """A second load must not double the rules, of the shared chains either."""
    seen = set()
    for line in load_text(ruleset(ID, [BRIDGED], [], True)).splitlines():
        words = line.split(" ")
        if words[0] == "flush":
            seen.add(tuple(words[2:5]))
        if words[:2] == ["add", "rule"]:
            assert tuple(words[2:5]) in seen, line


def test_the_shared_tables_go_only_with_the_chain_that_every_sandbox_refers_to() -> None:
    made = ruleset(ID, [BRIDGED, ROUTED], None, True)
    for family in ("bridge", "inet"):
        assert any(
            lines[-1].endswith("goto denied") for key, lines in made.chains.items() if key[0] == family
        )
        lines = unload_tables_text().splitlines()
        last = lines.index(f"delete table {family} sandbatch")
        assert lines[last - 1] == f"delete chain {family} sandbatch denied"


# -- the stage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "has_stage"),
    [({}, False), ({"egress": []}, True), ({"egress": ["1.1.1.1"]}, True), ({"isolate": True}, True)],
)
def test_only_who_asks_for_it_has_the_stage(fields: dict[str, object], has_stage: bool) -> None:
    names = [stage.name for stage in stages_of(make_spec(args=["true"], **fields))]
    assert ("egress" in names) is has_stage
    if has_stage:
        assert names.index("network") < names.index("egress") < names.index("container")


@pytest.fixture
def denied() -> Spec:
    return make_spec(args=["true"], network="one", egress=[])


@pytest.fixture
def with_nft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nft"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def network(folder: Path, plugin: str) -> None:
    text = '{"cniVersion": "1.0.0", "name": "one", "plugins": [{"type": "%s"}]}' % plugin  # noqa: UP031
    (folder / "one.conflist").write_text(text)


@pytest.mark.parametrize("plugin", ["macvlan", "ipvlan", "host-device", "vlan"])
def test_a_network_past_the_host_is_refused(
    tmp_path: Path, denied: Spec, with_nft: None, plugin: str
) -> None:
    network(tmp_path, plugin)
    with pytest.raises(BadInput, match=f"network one: plugin {plugin} leaves no end of a link on the host"):
        egress.check_possible(denied, [tmp_path])
    egress.check_possible(make_spec(args=["true"], network="one"), [tmp_path])


@pytest.mark.parametrize("plugin", ["bridge", "ptp"])
def test_a_network_with_a_link_on_the_host_is_taken(
    tmp_path: Path, denied: Spec, with_nft: None, plugin: str
) -> None:
    network(tmp_path, plugin)
    egress.check_possible(denied, [tmp_path])


def test_a_host_without_nft_refuses_who_needs_it_and_no_other(
    tmp_path: Path, denied: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostNotReady, match="nft is not on the PATH of this host; run sandbatch setup"):
        egress.check_possible(denied, [])
    egress.check_possible(make_spec(args=["true"]), [])
    row = doctor._nft()
    assert (row.ok, row.found) == (False, "not on the PATH")
    assert "apt-get install nftables" in row.mend
    assert row.name in doctor.OPTIONAL, "the worker starts without it"


# -- what the audit sees ----------------------------------------------------------------------------


def test_what_is_loaded_has_the_id_of_its_sandbox() -> None:
    chains = {("bridge", "denied"): 1, ("bridge", f"{ID}-eth0-from"): 9, ("inet", "sb-1-x"): 1}
    held = nft.Held(chains=chains, tables={"bridge", "inet"})
    assert egress_audit.loaded(held) == {f"chain bridge sandbatch {ID}-eth0-from": ID}
    assert egress_audit.loaded(nft.Held(tables={"inet"})) == {"table inet sandbatch": ""}
    assert egress_audit.loaded(nft.Held()) == {}


def whole(made: Ruleset) -> nft.Held:
    """As the kernel would have it."""
    chains = {key: len(lines) for key, lines in made.chains.items()}
    for family in made.families:
        chains[family, DENIED] = 1
        chains |= {(family, name): len(lines) for name, (_, lines) in BASES[family].items()}
    return nft.Held(
        chains=chains, sets=set(made.sets), elements=dict(made.elements), tables=set(made.families)
    )


@pytest.fixture
def running(tmp_path: Path) -> Journal:
    spec = make_spec(args=["true"], egress=[])
    known = journals.create(tmp_path, ID, attempt=1, batch="b", spec=spec)
    known.mark_begun("egress", {"links": [asdict(BRIDGED)]})
    return journals.read(known.folder)


def test_a_policy_is_missing_if_anything_of_it_is(running: Journal) -> None:
    """A chain of it, a rule, its place in a map, or what leads there: each leaves a way out."""
    made = ruleset(ID, egress.journaled(running), [], False)
    assert egress_audit.missing([running], whole(made)) == {}
    for chain in whole(made).chains:
        flushed, deleted = whole(made), whole(made)
        flushed.chains[chain] = 0
        del deleted.chains[chain]
        for held in (flushed, deleted):
            assert "sandbatch" in egress_audit.missing([running], held)[ID], chain
    for element in made.elements:
        held = whole(made)
        del held.elements[element]
        assert f"{element[2]} is not in map" in egress_audit.missing([running], held)[ID]
    assert "nft is not on the PATH" in egress_audit.missing([running], None)[ID]
