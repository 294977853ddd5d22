"""Networks of real plugins: attached, checked, and nothing of them left, whatever was gone before DEL."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import PLUGIN_DIRS, lack
from worker import netns
from worker.cni import Attachment, CniRuntime
from worker.cni_config import Network, find_network
from worker.cni_result import result_ips
from worker.errors import CniPluginError
from worker.spec import new_container_id

pytestmark = pytest.mark.usefixtures("host_parts", "own_network")

CLONE_NEWNET = 0x40000000
LEASES = Path("/var/lib/cni/networks")  # of lists that name no other place
CHAIN_OF_ONE = re.compile(r"CNI-(?:DN-|SN-)?[0-9a-f]{10,}")  # bridge and portmap: a chain an attachment

# gVisor's tutorial "Using CNI", as it stands there.
TUTORIAL = {
    "10-bridge.conf": """{
  "cniVersion": "0.4.0",
  "name": "mynet",
  "type": "bridge",
  "bridge": "cni0",
  "isGateway": true,
  "ipMasq": true,
  "ipam": {
    "type": "host-local",
    "subnet": "10.22.0.0/16",
    "routes": [
      { "dst": "0.0.0.0/0" }
    ]
  }
}
""",
    "99-loopback.conf": """{
  "cniVersion": "0.4.0",
  "name": "lo",
  "type": "loopback"
}
""",
}
PORTS = {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]}
BANDWIDTH = {"ingressRate": 1_000_000, "ingressBurst": 1_000_000}


@pytest.fixture
def own_network() -> Iterator[None]:
    """The host of a test is a netns of its own: links, rules and bridges of the machine stay as they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        output("ip", "link", "set", "lo", "up")
        yield
    finally:
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)


@dataclass
class Lab:
    """A runtime with folders of its own, and one sandbox's netns."""

    folder: Path
    container_id: str

    @property
    def runtime(self) -> CniRuntime:
        return CniRuntime(PLUGIN_DIRS, self.folder / "cache", self.folder / "lock", timeout_s=30)

    @property
    def leases_dir(self) -> Path:
        return self.folder / "leases"

    def attachment(self, if_name: str = "eth0", **capability_args: object) -> Attachment:
        path = netns.netns_path(self.container_id)
        return Attachment(self.container_id, path, if_name, capability_args=capability_args)

    def network(self, document: dict[str, object] | str, file: str = "net.conflist") -> Network:
        text = document if isinstance(document, str) else json.dumps(document)
        path = self.folder / "net.d" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return find_network(json.loads(text)["name"], [path.parent])

    def ipam(self, subnet: str = "10.231.0.0/24") -> dict[str, object]:
        routes = [{"dst": "0.0.0.0/0"}]
        return {"type": "host-local", "subnet": subnet, "routes": routes, "dataDir": str(self.leases_dir)}

    def left(self) -> dict[str, list[str]]:
        """What is there of any attachment; only what there is."""
        rules = output("iptables-save").splitlines() + output("ip6tables-save").splitlines()
        links = [one["ifname"] for one in json.loads(output("ip", "-j", "link"))]
        entries = self.folder / "cache/results"
        found = {
            "rules": [one for one in rules if CHAIN_OF_ONE.search(one) or self.container_id in one],
            "addresses in rules": [one for one in rules if re.search(r"\b10\.231\.\d+\.(?!0/)\d+", one)],
            "leases": leases(self.leases_dir),
            "links": [one for one in links if re.match(r"veth|mac|bwp|ifb|sbpeer", one)],
            "cache": os.listdir(entries) if entries.is_dir() else [],
            "netns": [one for one in netns.list_netns() if one == self.container_id],
        }
        return {kind: objects for kind, objects in found.items() if objects}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Its netns is there; the test ends it."""
    made = Lab(tmp_path, new_container_id())
    netns.create_netns(made.container_id)
    yield made
    netns.delete_netns(made.container_id)


def output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def leases(folder: Path) -> list[str]:
    """The leased addresses below a folder of host-local."""
    found = [path.name for path in folder.rglob("*") if path.is_file()]
    return sorted(one for one in found if re.match(r"[0-9a-f]+[.:]", one))


def nothing(lab: Lab) -> None:
    pass


def addresses(lab: Lab) -> None:
    output("ip", "-n", lab.container_id, "addr", "flush", "dev", "eth0")


def link(lab: Lab) -> None:
    output("ip", "-n", lab.container_id, "link", "del", "eth0")


def whole_netns(lab: Lab) -> None:
    netns.delete_netns(lab.container_id)


def mount(lab: Lab) -> None:
    """After a reboot in which /run was kept: the name without its netns."""
    netns.delete_netns(lab.container_id)
    netns.netns_path(lab.container_id).touch()


GONE = (nothing, addresses, link, whole_netns, mount)


def bridge(lab: Lab, version: str = "1.0.0") -> dict[str, object]:
    plugin = {"type": "bridge", "bridge": "sbtest0", "isGateway": True, "ipMasq": True, "ipam": lab.ipam()}
    return {"cniVersion": version, "name": "net", "plugins": [plugin]}


def dual_stack(lab: Lab) -> dict[str, object]:
    ranges = [[{"subnet": "10.231.0.0/24"}], [{"subnet": "fd00:231::/64"}]]
    ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(lab.leases_dir)}
    plugin = {"type": "bridge", "bridge": "sbtest0", "isGateway": True, "ipMasq": True, "ipam": ipam}
    return {"cniVersion": "1.0.0", "name": "net", "plugins": [plugin]}


def bridge_chain(lab: Lab) -> dict[str, object]:
    document = bridge(lab)
    document["plugins"] = [
        *document["plugins"],  # type: ignore[misc]
        {"type": "tuning", "sysctl": {"net.ipv4.conf.all.log_martians": "1"}, "mtu": 1400},
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        {"type": "firewall", "backend": "iptables"},
        {"type": "bandwidth", **BANDWIDTH},
    ]
    return document


def ptp(lab: Lab) -> dict[str, object]:
    plugin = {"type": "ptp", "ipMasq": True, "ipam": lab.ipam()}
    return {"cniVersion": "0.4.0", "name": "net", "plugins": [plugin, {"type": "firewall"}]}


def macvlan(lab: Lab) -> dict[str, object]:
    output("ip", "link", "add", "sbmaster", "type", "veth", "peer", "name", "sbother")
    plugin = {"type": "macvlan", "master": "sbmaster", "ipam": lab.ipam()}
    return {"cniVersion": "0.3.1", "name": "net", "plugins": [plugin]}


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("make", [bridge, dual_stack, bridge_chain, ptp, macvlan])
def test_del_leaves_nothing_whatever_is_gone(lab: Lab, make: Callable[[Lab], dict], gone: Callable) -> None:
    """netstack takes the addresses, a user the link, a reboot the netns; then the plugins leave rules."""
    network = lab.network(make(lab))
    need(network)
    attachment = lab.attachment(**PORTS)
    result = lab.runtime.cni_add(network, attachment)
    assert leases(lab.leases_dir) == sorted(result_ips(result, "eth0"))
    gone(lab)
    lab.runtime.cni_del(network, attachment)
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}


def test_the_two_networks_of_the_tutorial(lab: Lab, tutorial: Path) -> None:
    """Its files, unchanged: the sandbox has its address and its way out, and nothing is left of it."""
    loopback, mynet = (find_network(name, [tutorial]) for name in ("lo", "mynet"))
    lab.runtime.cni_add(loopback, lab.attachment("lo"))
    result = lab.runtime.cni_add(mynet, lab.attachment())
    (ip,) = result_ips(result, "eth0")
    assert ip.startswith("10.22.0.")
    assert f"inet {ip}/16" in output("ip", "-n", lab.container_id, "addr", "show", "dev", "eth0")
    assert "default via 10.22.0.1" in output("ip", "-n", lab.container_id, "route")
    assert ip in leases(LEASES / "mynet")
    assert "MASQUERADE" in output("iptables-save", "-t", "nat")
    assert answers_on_loopback(lab.container_id)

    addresses(lab)
    lab.runtime.cni_del(mynet, lab.attachment())
    lab.runtime.cni_del(loopback, lab.attachment("lo"))
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}
    assert ip not in leases(LEASES / "mynet")
    assert "MASQUERADE" not in output("iptables-save", "-t", "nat")


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
@pytest.mark.parametrize("is_list", [True, False])
def test_each_version_as_list_and_as_single_plugin(lab: Lab, version: str, is_list: bool) -> None:
    """A plugin too old for a version says so itself, with CNI's code for it."""
    document = bridge(lab, version)
    (plugin,) = document["plugins"]  # type: ignore[misc]
    single = {"cniVersion": version, "name": "net", **plugin}
    network = lab.network(document) if is_list else lab.network(single, "net.conf")
    if version not in lab.runtime.cni_version("bridge"):
        with pytest.raises(CniPluginError, match="incompatible CNI versions") as caught:
            lab.runtime.cni_add(network, lab.attachment())
        assert caught.value.code == 1
        return
    result = lab.runtime.cni_add(network, lab.attachment())
    assert result["cniVersion"] == version
    if network.is_at_least("0.4.0"):
        lab.runtime.cni_check(network, lab.attachment())
    lab.runtime.cni_status(network)
    lab.runtime.cni_del(network, lab.attachment())
    lab.runtime.cni_del(network, lab.attachment())  # safe to repeat
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}


def test_del_after_an_add_that_failed_in_the_middle(lab: Lab) -> None:
    """The bridge plugin has done all of its work, and no result tells of it."""
    document = bridge(lab)
    document["plugins"] = [*document["plugins"], {"type": "tuning", "sysctl": {"net.no.such": "1"}}]  # type: ignore[misc]
    network = lab.network(document)
    with pytest.raises(CniPluginError, match="tuning"):
        lab.runtime.cni_add(network, lab.attachment())
    assert "rules" in lab.left()
    lab.runtime.cni_del(network, lab.attachment())
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}


def test_del_after_an_add_that_never_came_so_far(lab: Lab) -> None:
    """A name without its netns, which the plugins call an unknown file system, must not stop DEL for ever."""
    mount(lab)
    lab.runtime.cni_del(lab.network(bridge(lab)), lab.attachment())
    assert lab.left() == {}


@pytest.mark.parametrize("gone", [addresses, link])
def test_check_tells_what_is_gone(lab: Lab, gone: Callable[[Lab], None]) -> None:
    network = lab.network(bridge(lab))
    lab.runtime.cni_add(network, lab.attachment())
    lab.runtime.cni_check(network, lab.attachment())
    gone(lab)
    with pytest.raises(CniPluginError, match="CHECK by plugin bridge"):
        lab.runtime.cni_check(network, lab.attachment())
    lab.runtime.cni_del(network, lab.attachment())


def test_gc_frees_what_is_not_valid_and_keeps_the_rest(lab: Lab) -> None:
    """The stale one has no netns any more: its rules and its lease go all the same."""
    newest = lab.runtime.cni_version("bridge")[-1]  # from 1.1.0 on, the plugins' own GC runs as well
    network = lab.network(bridge(lab, newest))
    stale = Attachment(new_container_id(), Path("/var/run/netns/sbtest-stale"))
    netns.create_netns(stale.netns_path.name)
    try:
        lab.runtime.cni_add(network, stale)
    finally:
        netns.delete_netns(stale.netns_path.name)
    kept = result_ips(lab.runtime.cni_add(network, lab.attachment()), "eth0")
    assert lab.runtime.cni_gc(network, [lab.attachment()]) == []
    assert leases(lab.leases_dir) == kept
    assert stale.container_id not in output("iptables-save")
    assert lab.left()["cache"] == [f"net-{lab.container_id}-eth0"]
    assert not stale.netns_path.exists()
    lab.runtime.cni_check(network, lab.attachment())
    assert lab.runtime.cni_gc(network, []) == []
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}


def test_capabilities_reach_the_plugins(lab: Lab) -> None:
    """A port of the host leads into the sandbox while it is attached, and not after."""
    network = lab.network(bridge_chain(lab))
    need(network)
    lab.runtime.cni_add(network, lab.attachment(**PORTS))
    assert "--dport 18080" in output("iptables-save", "-t", "nat")
    lab.runtime.cni_del(network, lab.attachment(**PORTS))
    assert "--dport 18080" not in output("iptables-save", "-t", "nat")


def test_two_networks_in_one_netns(lab: Lab) -> None:
    """DEL of one, with everything gone, leaves the other as it was."""
    first = lab.network(bridge(lab))
    plugin = {"type": "bridge", "bridge": "sbtest1", "ipMasq": True, "ipam": lab.ipam("10.231.9.0/24")}
    second = lab.network({"cniVersion": "1.0.0", "name": "net2", "plugins": [plugin]}, "net2.conflist")
    lab.runtime.cni_add(first, lab.attachment())
    lab.runtime.cni_add(second, lab.attachment("net1"))
    addresses(lab)
    lab.runtime.cni_del(first, lab.attachment())
    lab.runtime.cni_check(second, lab.attachment("net1"))
    lab.runtime.cni_del(second, lab.attachment("net1"))
    netns.delete_netns(lab.container_id)
    assert lab.left() == {}


@pytest.fixture
def tutorial(tmp_path: Path) -> Iterator[Path]:
    """Its folder; the leases are where host-local keeps them, and go with the test."""
    had_leases = (LEASES / "mynet").exists()
    folder = tmp_path / "tutorial"
    folder.mkdir()
    for name, text in TUTORIAL.items():
        (folder / name).write_text(text)
    yield folder
    if not had_leases:
        shutil.rmtree(LEASES / "mynet", ignore_errors=True)


def answers_on_loopback(container_id: str) -> bool:
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    )
    return (
        subprocess.run(["ip", "netns", "exec", container_id, "python3", "-c", code], check=False).returncode
        == 0
    )


def need(network: Network) -> None:
    for plugin in network.plugins:
        if not any((folder / plugin["type"]).is_file() for folder in PLUGIN_DIRS):
            lack(f"this machine lacks the CNI plugin {plugin['type']}")
