"""Results as libcni's types have them. What cnitool makes of whole lists is in test_cni.py."""

import pytest

from worker.cni_result import converted, result_ips, typed

HOST, SANDBOX = {"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}


def test_unknown_and_empty_fields_are_dropped():
    given = {
        "ips": [{"address": "10.0.0.2/8", "gateway": "", "x": 1}],
        "routes": [],
        "dns": {"domain": "", "search": []},
        "x": 1,
    }
    assert typed(given, "1.0.0") == {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/8"}]}


def test_zero_is_a_value_where_go_has_a_pointer():
    given = {
        "ips": [{"address": "10.0.0.2/8", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "mtu": 0, "priority": 0, "table": 0, "scope": 0}],
    }
    result = typed(given, "1.0.0")
    assert result["ips"] == given["ips"]
    assert result["routes"] == [{"dst": "0.0.0.0/0", "table": 0, "scope": 0}]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("10.0.0.2/8", "10.0.0.2/8"),
        ("FD00:0:0::00a5/64", "fd00::a5/64"),
        ("2001:db8:0:1:1:1:1:1/64", "2001:db8:0:1:1:1:1:1/64"),
        ("::ffff:10.0.0.2/120", "10.0.0.2/24"),
        ("::ffff:10.0.0.2/64", "10.0.0.2/0"),
    ],
)
def test_addresses_are_written_as_go_writes_them(given, written):
    assert typed({"ips": [{"address": given}]}, "1.0.0")["ips"] == [{"address": written}]


@pytest.mark.parametrize(
    "address",
    ["10.0.0.2", "10.0.0.2/33", "10.0.0.02/8", "10.0.0.2/255.0.0.0", "fe80::1%eth0/64", 167772162, "", None],
)
def test_what_is_no_address_is_no_result(address):
    """Python's ipaddress takes netmasks, zones and plain numbers."""
    with pytest.raises(ValueError, match="ips: address: "):
        typed({"ips": [{"address": address}]}, "1.0.0")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("interfaces", {}, "interfaces: {} is no list"),
        ("interfaces", [None], "interfaces: None is no object"),
        ("interfaces", [{"name": 1}], "interfaces: name: 1 is no string"),
        ("interfaces", [{"name": "a", "mtu": "1"}], "interfaces: mtu: '1' is no integer"),
        ("ips", [{"address": "10.0.0.2/8", "interface": True}], "ips: interface: True is no integer"),
        ("routes", [{"dst": "10.0.0.0"}], "routes: dst: "),
        ("routes", [{"dst": "::/0", "gw": "fe80::1%a"}], "routes: gw: 'fe80::1%a' has a zone"),
        ("dns", [], r"dns: \[\] is no object"),
        ("dns", {"search": [1]}, "dns: search: 1 is no string"),
        ("cniVersion", "0.5.0", "result of CNI version '0.5.0'"),
    ],
)
def test_a_wrong_field_is_named(key, value, words):
    with pytest.raises(ValueError, match=words):
        typed({key: value}, "1.0.0")


def test_older_versions_keep_what_the_plugin_calls_the_family():
    """And an empty dns: Go's omitempty does nothing for a struct."""
    result = typed({"ips": [{"address": "10.0.0.2/8"}], "interfaces": [{"name": "a", "mtu": 1}]}, "0.4.0")
    assert result["ips"] == [{"version": "", "address": "10.0.0.2/8"}]
    assert result["interfaces"] == [{"name": "a"}]
    assert result["dns"] == {}


def test_a_newer_result_for_an_older_list():
    given = {"interfaces": [{"name": "a", "mtu": 9, "pciID": "1"}], "ips": [{"address": "fd00::2/64"}]}
    assert converted(typed(given, "1.1.0"), "0.3.1") == {
        "cniVersion": "0.3.1",
        "interfaces": [{"name": "a"}],
        "ips": [{"version": "6", "address": "fd00::2/64"}],
        "dns": {},
    }


def test_a_result_of_the_first_versions_for_a_newer_list():
    given = {
        "cniVersion": "0.2.0",
        "ip4": {"ip": "10.0.0.2/8", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
        "ip6": {"ip": "fd00::2/64"},
    }
    old = typed(given, "1.0.0")
    assert old == {**given, "dns": {}}
    assert converted(old, "1.0.0") == {
        "cniVersion": "1.0.0",
        "ips": [{"address": "10.0.0.2/8", "gateway": "10.0.0.1"}, {"address": "fd00::2/64"}],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    assert [one["version"] for one in converted(old, "0.4.0")["ips"]] == ["4", "6"]
    assert result_ips(old, "eth0") == ["10.0.0.2", "fd00::2"]


@pytest.mark.parametrize(
    ("interfaces", "owners", "mine"),
    [
        ([HOST, SANDBOX], [1, 0], ["10.0.0.0"]),
        ([HOST, SANDBOX, {"name": "net1", "sandbox": "/ns"}], [2, 1], ["10.0.0.1"]),
        ([], [None, None], ["10.0.0.0", "10.0.0.1"]),
        ([HOST, SANDBOX], [None, None], ["10.0.0.0", "10.0.0.1"]),
        ([HOST], [0, 0], ["10.0.0.0", "10.0.0.1"]),
    ],
)
def test_the_address_of_a_sandbox_is_that_of_its_own_link(interfaces, owners, mine):
    """A bridge's own address stands in the result as well; plain IPAM names no link at all."""
    ips = [{"address": f"10.0.0.{number}/8", "interface": owner} for number, owner in enumerate(owners)]
    result = typed({"interfaces": interfaces, "ips": ips}, "1.0.0")
    assert result_ips(result, "eth0") == mine
