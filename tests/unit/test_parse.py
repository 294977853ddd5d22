"""What people write on the command line becomes parts of a spec, or is refused with an example."""

from typing import Any

import pytest

from cli import parse
from worker.errors import BadInput
from worker.spec import make_spec


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("512m", 512 << 20), ("1.5g", 3 << 29), ("64MiB", 64 << 20), ("10kb", 10240), ("7", 7)],
)
def test_a_size_counts_by_1024(text: str, wanted: int) -> None:
    assert parse.size(text, "--memory") == wanted


@pytest.mark.parametrize("text", ["", "m", "-1m", "1x", "1e9", "0x10", "1 m m"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--memory"):
        parse.size(text, "--memory")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("80", {"port": 80, "host_port": 0}),
        ("8080:80", {"port": 80, "host_port": 8080}),
        ("127.0.0.1:8080:80", {"port": 80, "host_port": 8080, "host_ip": "127.0.0.1"}),
        ("127.0.0.1::80", {"port": 80, "host_port": 0, "host_ip": "127.0.0.1"}),
        ("[::1]:5353:53/udp", {"port": 53, "host_port": 5353, "host_ip": "::1", "protocol": "udp"}),
    ],
)
def test_a_published_port_is_written_as_for_docker(text: str, wanted: dict[str, Any]) -> None:
    assert parse.publish(text) == wanted
    make_spec(args=["true"], publish=[wanted])


@pytest.mark.parametrize("text", ["", "80:", "a:80", "1:2:3:4", "80/TCP"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--publish"):
        parse.publish(text)


def test_a_network_takes_an_ip_a_mac_and_aliases() -> None:
    found = parse.network("web:ip=10.0.0.9,ip=fd00::9,mac=02:00:00:00:00:09,alias=a,alias=b")
    assert found == {
        "name": "web",
        "ips": ["10.0.0.9", "fd00::9"],
        "mac": "02:00:00:00:00:09",
        "aliases": ["a", "b"],
    }
    make_spec(args=["true"], networks=[found])


@pytest.mark.parametrize("text", ["web:ip", "web:colour=red"])
def test_an_option_that_no_network_has_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--network web"):
        parse.network(text)


def test_egress_is_open_closed_or_a_list() -> None:
    assert parse.egress([]) is None
    assert parse.egress(["deny"]) == []
    assert parse.egress(["10.0.0.0/8:443,1.1.1.1", "[fd00::/8]:53/udp"]) == [
        "10.0.0.0/8:443",
        "1.1.1.1",
        "[fd00::/8]:53/udp",
    ]
    with pytest.raises(BadInput, match="leave deny out"):
        parse.egress(["deny", "10.0.0.0/8"])


@pytest.mark.parametrize(
    "rule", ["10.0.0.0/8", "10.0.0.0/8:443", "1.1.1.1:53/udp", "[fd00::/8]:1-65535", "[::1]", "0.0.0.0/0/tcp"]
)
def test_an_egress_rule_is_taken(rule: str) -> None:
    assert make_spec(args=["true"], egress=[rule]).egress == [rule]


@pytest.mark.parametrize(
    "rule",
    ["", "deny", "10.0.0.1/8", "10.0.0.0/33", "1.1.1.1:0", "1.1.1.1:9-1", "1.1.1.1:65536", "fd00::/8:53"],
)
def test_what_is_no_egress_rule_is_refused(rule: str) -> None:
    with pytest.raises(BadInput, match=r"egress\.0"):
        make_spec(args=["true"], egress=[rule])


def test_a_bind_is_read_only_said_or_not() -> None:
    wanted = {"type": "bind", "source": "/srv/a", "target": "/data"}
    assert parse.bind("/srv/a:/data") == parse.bind("/srv/a:/data:ro") == wanted
    with pytest.raises(BadInput, match="binds are read-only"):
        parse.bind("/srv/a:/data:rw")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"networks": [{"name": "a"}, {"name": "a"}]}, "named twice"),
        ({"network": "a", "networks": [{"name": "b"}]}, "give one of them"),
        ({"networks": [{"name": "a", "mac": "01:00:00:00:00:01"}]}, "MAC address of one machine"),
        ({"publish": [{"port": 1, "host_port": 9}, {"port": 2, "host_port": 9}]}, "named twice"),
        ({"mounts": [{"type": "bind", "target": "/a/../b", "source": "/c"}]}, "without '..'"),
        ({"mounts": [{"type": "bind", "target": "/a"}]}, "a bind needs a source"),
        ({"mounts": [{"type": "tmpfs", "target": "/"}]}, "over /"),
        ({"mounts": [{"type": "tmpfs", "target": "/a"}, {"type": "tmpfs", "target": "/a/"}]}, "same target"),
        ({"writable_bytes": 1 << 20}, "not writable"),
        ({"bandwidth": {"ingress_burst": 8000}}, "needs ingress_rate"),
        ({"restart": "always"}, "on-failure"),
        ({"deadline_at": "2027-01-01T00:00:00"}, "with its zone"),
        ({"ttl_s": 0.0}, "greater than 0"),
        ({"hosts": {"a b": "10.0.0.1"}}, "host name"),
        ({"hosts": {"db": "10.0.0"}}, "IPv4 or IPv6"),
        ({"cpus": 0.0}, "0.01"),
    ],
)
def test_a_spec_whose_parts_do_not_fit_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_spec(args=["true"], **fields)


def test_the_spec_of_the_release_before_is_still_read() -> None:
    assert make_spec(args=["true"], network="mynet").networks[0].name == "mynet"


@pytest.mark.parametrize("read", [parse.size, parse.rate])
def test_a_number_without_end_is_refused_as_no_number(read: Any) -> None:
    """As a float it is infinite, and has no integer: a traceback in place of a line."""
    with pytest.raises(BadInput):
        read("9" * 400, "--flag")


def test_a_moment_before_the_calendar_is_no_since() -> None:
    """Python has no seconds for it: a traceback in place of a line."""
    with pytest.raises(BadInput, match="--since"):
        parse.since("0001-01-01T00:00:00")
