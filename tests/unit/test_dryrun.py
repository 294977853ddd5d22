"""What stands in a dry run for what only a launch can know."""

import json

import pytest

from cli.plan import print_plan
from worker.attachments import Planned
from worker.cni import Attachment
from worker.cni_config import network_from_bytes
from worker.dryrun import link_of
from worker.egress_rules import load_text, ruleset


def planned(plugin, **ipam):
    document = {
        "cniVersion": "1.0.0",
        "name": "mynet",
        "plugins": [{**plugin, "ipam": {"type": "host-local", **ipam}}],
    }
    return Planned(network_from_bytes(json.dumps(document).encode()), Attachment("sb-0", "/netns", "eth0"))


@pytest.mark.parametrize(
    ("ipam", "addresses", "neighbours"),
    [
        ({"subnet": "10.1.0.0/16"}, ("10.1.0.2/16",), ("10.1.0.1/16",)),
        (
            {"ranges": [[{"subnet": "10.1.0.0/24"}, {"subnet": "10.2.0.0/24"}], [{"subnet": "fd00::/64"}]]},
            ("10.1.0.2/24", "fd00::2/64"),
            ("10.1.0.1/24", "fd00::1/64"),
        ),
        ({"subnet": "10.1.0.4/30", "gateway": "10.1.0.6"}, ("10.1.0.6/30",), ("10.1.0.6/30",)),
        ({"type": "dhcp"}, ("192.0.2.2/24",), ("192.0.2.1/24",)),
        ({"subnet": "10.1.0.8/32"}, ("10.1.0.8/32",), ("10.1.0.8/32",)),
    ],
)
def test_the_rules_have_the_subnets_of_the_network(ipam, addresses, neighbours):
    """Of the address only the last digits are known at launch; rules of isolation are by subnet."""
    link = link_of(0, planned({"type": "bridge", "bridge": "mine0"}, **ipam))
    assert (link.addresses, link.neighbours, link.bridge) == (addresses, neighbours, "mine0")
    assert load_text(ruleset("sb-0", [link], ["10.0.0.0/8:443"], True))


def test_a_ptp_network_has_no_bridge():
    assert link_of(1, planned({"type": "ptp"}, subnet="10.1.0.0/24")).bridge is None


def test_each_part_has_its_section_for_people(capsys):
    call = {
        "command": "ADD",
        "plugin": "bridge",
        "network": "mynet",
        "if_name": "eth0",
        "env": {"CNI_COMMAND": "ADD", "CNI_ARGS": "a\nb"},
        "stdin": {"type": "bridge"},
    }
    parts = {"config": {"a": 1}, "cni": [call], "firewall": "", "runsc": [["conmon", "-c", "a b"]]}
    print_plan({**parts, "unknown": {"mac of eth0": "02:00:00:00:00:00"}})
    assert capsys.readouterr().out.split("\n\n")[:-1] == [
        '# config.json\n{\n "a": 1\n}',
        "# CNI ADD by plugin bridge: network mynet, eth0\n"
        'CNI_COMMAND=ADD\nCNI_ARGS=a\\nb\n{\n "type": "bridge"\n}',
        "# firewall: nft -f -\nnothing: no egress policy, not isolated",
        "# programs\nconmon -c 'a b'",
        "# known only at launch; here stands\nmac of eth0: 02:00:00:00:00:00",
    ]
