"""How many more links a network can take: by host-local's own arithmetic, and the ports of a bridge."""

import json
import time

import pytest

from worker import network_room as rooms
from worker.network_room import BRIDGE_PORTS, network_room
from worker.settings import Settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "LINKS", tmp_path / "links")
    (tmp_path / "net.d").mkdir()
    return Settings(state_dir=tmp_path / "state", cni_conf_dir=tmp_path / "net.d")


def network(settings, plugin="bridge", **ipam):
    leases = settings.cni_conf_dir.parent / "leases"
    ipam = {"type": "host-local", "dataDir": str(leases), **ipam}
    document = {
        "cniVersion": "1.0.0",
        "name": "n",
        "plugins": [{"type": plugin, "bridge": "br", "ipam": ipam}],
    }
    (settings.cni_conf_dir / "n.conflist").write_text(json.dumps(document))
    (leases / "n").mkdir(parents=True, exist_ok=True)
    return leases / "n"


@pytest.mark.parametrize(
    ("ipam", "free"),
    [
        ({"subnet": "10.1.0.0/24"}, 253),  # not the network, the gateway, the broadcast
        ({"subnet": "10.1.0.0/24", "gateway": "10.1.0.254"}, 253),
        ({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.12"}, 3),
        ({"ranges": [[{"subnet": "10.1.0.0/30"}, {"subnet": "10.2.0.0/30"}]]}, 2),
        ({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.2.0.0/29"}]]}, 5),  # one of each
        ({"ranges": [[{"subnet": "fd00::/64"}]]}, None),
        ({"subnet": "nonsense"}, None),  # of which the plugin itself speaks
        ({"type": "dhcp"}, None),
    ],
)
def test_free_addresses(settings, ipam, free):
    network(settings, "ptp", **ipam)
    assert network_room(settings) == {"n": free}


def test_leases_and_ports_count_and_a_changed_file_is_read_again(settings):
    leases = network(settings, subnet="10.1.0.0/29")
    for name in ("10.1.0.2", "10.1.0.3", "192.168.0.1", "last_reserved_ip.0", "lock"):
        (leases / name).touch()
    assert network_room(settings) == {"n": 3}
    network(settings, subnet="10.1.0.0/16")
    assert network_room(settings) == {"n": BRIDGE_PORTS}
    ports = rooms.LINKS / "br" / "brif"
    ports.mkdir(parents=True)
    for number in range(BRIDGE_PORTS):
        (ports / f"veth{number}").touch()
    assert network_room(settings) == {"n": 0}


def test_a_look_at_a_host_with_many_sandboxes_is_cheap(settings):
    """It precedes each look for work. Measured: 0.3 ms with 250 on 2 busy cores."""
    leases = network(settings, subnet="10.1.0.0/16")
    for number in range(2, 252):
        (leases / f"10.1.0.{number}").touch()
    network_room(settings)
    took = []
    for _ in range(20):
        began = time.thread_time()
        network_room(settings)
        took.append(time.thread_time() - began)
    assert min(took) < 0.005
