"""What a spec asks of plugins, as libcni's capability arguments, and what is refused."""

import json

import pytest

from worker.capabilities import advertised, capability_args, check, port_mappings, publishing
from worker.cni_config import network_from_bytes
from worker.errors import BadInput
from worker.spec import Spec, make_spec

EVERYTHING = {"portMappings", "bandwidth", "ips", "mac", "aliases"}


def network(*plugins: dict[str, object]):
    document = {"cniVersion": "1.0.0", "name": "net", "plugins": list(plugins or [{"type": "bridge"}])}
    return network_from_bytes(json.dumps(document).encode())


def spec(*networks: dict[str, object], **fields: object) -> Spec:
    return make_spec(args=["true"], networks=list(networks or [{"name": "net"}]), **fields)


def test_a_network_advertises_what_any_of_its_plugins_marks_true():
    chain = network(
        {"type": "bridge", "capabilities": {"ips": True, "mac": False}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "tuning"},
    )
    assert advertised(chain) == {"ips", "portMappings"}


@pytest.mark.parametrize(
    ("fields", "request_", "words"),
    [
        (
            {"publish": [{"port": 80}]},
            {},
            "network net: publishes no ports: its list lacks a plugin with the capability portMappings"
            r" \(portmap\)",
        ),
        ({"bandwidth": {"ingress_rate": 10**6}}, {}, "limits no bandwidth: .* capability bandwidth"),
        ({}, {"ips": ["10.0.0.9"]}, "takes no address that is asked for: .* capability ips"),
        ({}, {"mac": "02:00:00:00:00:01"}, "takes no MAC address that is asked for: .* capability mac"),
        ({}, {"aliases": ["db"]}, "announces no aliases: .* capability aliases"),
    ],
)
def test_what_no_plugin_advertises_is_refused_in_words(fields, request_, words):
    """libcni would drop it without a word."""
    asked = spec({"name": "net", **request_}, **fields)
    with pytest.raises(BadInput, match=words):
        check(asked, {"net": set()})
    check(asked, {"net": EVERYTHING})


def test_ports_are_published_on_the_first_network_that_can():
    """Twice the same port on two links would be two rules, of which one wins."""
    asked = spec({"name": "a"}, {"name": "b"}, {"name": "c"}, publish=[{"port": 80}])
    able = {"portMappings"}
    assert publishing(asked, {"a": set(), "b": able, "c": able}) == 1
    check(asked, {"a": set(), "b": able, "c": able})


def test_each_link_must_limit_the_bandwidth():
    """One without a limit would be a way around it."""
    asked = spec({"name": "a"}, {"name": "b"}, bandwidth={"egress_rate": 10**6})
    with pytest.raises(BadInput, match="network b: limits no bandwidth"):
        check(asked, {"a": {"bandwidth"}, "b": set()})


@pytest.mark.parametrize(
    ("rate", "given", "burst"),
    [
        (8_000, None, 8 * 65536),  # a whole GSO packet at least
        (100_000_000, None, 10_000_000),  # a tenth of a second
        (10**12, None, 2**32 - 1),  # what the plugin can count
        (10_000_000, 9_000_000, 9_000_000),
    ],
)
def test_a_rate_has_a_burst_as_the_plugin_demands(rate, given, burst):
    asked = spec(bandwidth={"ingress_rate": rate, "ingress_burst": given})
    check(asked, {"net": {"bandwidth"}})
    args = capability_args(asked, asked.networks[0], network())
    assert args == {"bandwidth": {"ingressRate": rate, "ingressBurst": burst}}


def test_a_burst_of_more_seconds_than_the_kernel_can_count_is_refused():
    """The plugin would let it wrap around: a limit that is none."""
    asked = spec(bandwidth={"egress_rate": 8_000, "egress_burst": 8_000 * 271})
    with pytest.raises(BadInput, match=r"bandwidth egress_burst: .* more than 270 s"):
        check(asked, {"net": {"bandwidth"}})


def test_addresses_mac_and_aliases_are_those_of_the_one_link():
    asked = spec(
        {"name": "net", "ips": ["10.0.0.9", "fd00::9/64"], "mac": "02:00:00:00:00:01"}, {"name": "b"}
    )
    assert capability_args(asked, asked.networks[0], network()) == {
        "ips": ["10.0.0.9", "fd00::9/64"],
        "mac": "02:00:00:00:00:01",
    }
    assert capability_args(asked, asked.networks[1], network()) == {}


def test_aliases_are_a_list_but_for_dnsname():
    """CONVENTIONS.md has a list; dnsname and podman an object by network."""
    asked = spec({"name": "net", "aliases": ["db", "www"]})
    args = capability_args(asked, asked.networks[0], network({"type": "alias"}))
    assert args == {"aliases": ["db", "www"]}
    args = capability_args(asked, asked.networks[0], network({"type": "dnsname"}))
    assert args == {"aliases": {"net": ["db", "www"]}}


def test_port_mappings_are_as_portmap_reads_them():
    published = [
        {"host_ip": None, "host_port": 8080, "port": 80, "protocol": "tcp"},
        {"host_ip": "127.0.0.1", "host_port": 5353, "port": 53, "protocol": "udp"},
    ]
    assert port_mappings(published) == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]
