"""Our own network: a subnet and a bridge that nothing on the host has, written once."""

import json
from ipaddress import IPv4Network

import pytest
from pyroute2 import IPRoute

from worker import journal as journals
from worker import subnet
from worker.capabilities import advertised
from worker.cni_config import find_network
from worker.errors import HostNotReady
from worker.settings import Settings
from worker.spec import make_spec


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "bin").mkdir()
    for plugin in ("portmap", "bandwidth"):
        (tmp_path / "bin" / plugin).touch()
    return Settings(
        cni_path=str(tmp_path / "bin"),
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        cni_conf_dir=tmp_path / "net.d",
        cni_cache_dir=tmp_path / "cni",
    )


def written(settings: Settings) -> dict:
    subnet.ensure_network(settings)
    return find_network("sandbatch", [settings.own_cni_conf_dir]).plugins[0]


def users_network(settings: Settings, *ipams: object) -> None:
    settings.cni_conf_dir.mkdir(exist_ok=True)
    plugins = [{"type": "bridge", "ipam": ipam} for ipam in ipams]
    document = {"cniVersion": "1.0.0", "name": "theirs", "plugins": plugins}
    (settings.cni_conf_dir / "10-theirs.conflist").write_text(json.dumps(document))


def test_the_network_has_the_shape_of_the_tutorials(settings):
    plugin = written(settings)
    assert (plugin["type"], plugin["isGateway"], plugin["ipMasq"]) == ("bridge", True, True)
    assert plugin["ipam"]["type"] == "host-local"
    assert plugin["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]


def test_the_subnet_is_none_that_the_host_has_a_route_to(settings):
    mine = IPv4Network(written(settings)["ipam"]["subnet"])
    with IPRoute() as ipr:
        routes = [(one.get_attr("RTA_DST"), one["dst_len"]) for one in ipr.get_routes(family=2)]
    others = [IPv4Network(f"{address}/{length}") for address, length in routes if address and length >= 8]
    assert not [one for one in others if one.overlaps(mine)]


def test_the_subnets_of_the_users_networks_are_taken_too(settings):
    """Their bridge, and with it the route, comes with their first sandbox."""
    free = written(settings)["ipam"]["subnet"]
    (settings.own_cni_conf_dir / subnet.FILE).unlink()
    users_network(settings, {"type": "host-local", "ranges": [[{"subnet": free}]]})
    assert not IPv4Network(written(settings)["ipam"]["subnet"]).overlaps(IPv4Network(free))


def test_a_users_mistake_does_not_stop_us(settings):
    """A worker that does not start for a typo in a network that nobody uses would be hard to understand."""
    users_network(settings, {"subnet": "10.0.0/8"}, {"subnet": "fd00::/64"}, {"subnet": ""}, {"subnet": 7})
    (settings.cni_conf_dir / "20-broken.conflist").write_text("{")
    assert written(settings)["ipam"]["subnet"]


def test_a_file_that_is_there_stays_as_it_is(settings):
    """An administrator may have changed it; and sandboxes hold addresses of its subnet."""
    file = subnet.ensure_network(settings)
    file.write_text("changed by hand")
    assert subnet.ensure_network(settings) == file
    assert file.read_text() == "changed by hand"
    assert [one.name for one in file.parent.iterdir()] == [subnet.FILE]


def test_leases_stand_beside_the_cache_of_this_host(settings):
    """Two systems on one machine have a folder each; the machine's own one is host-local's default."""
    assert written(settings)["ipam"]["dataDir"] == str(settings.cni_cache_dir / "networks")
    (settings.own_cni_conf_dir / subnet.FILE).unlink()
    machine = settings.model_copy(update={"cni_cache_dir": subnet.LIBCNI_DIR})
    assert "dataDir" not in written(machine)["ipam"]


def test_a_host_without_a_free_subnet_says_what_to_do(settings):
    users_network(settings, *({"subnet": one} for one in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))
    with pytest.raises(HostNotReady, match=r"no private subnet is free on this host; write .* by hand"):
        subnet.ensure_network(settings)


def test_it_takes_what_a_spec_may_ask_for_as_far_as_the_host_has_the_plugins(settings, tmp_path):
    written(settings)
    network = find_network("sandbatch", [settings.own_cni_conf_dir])
    assert advertised(network) == {"ips", "mac", "portMappings", "bandwidth"}
    (tmp_path / "bin/bandwidth").unlink()
    (settings.own_cni_conf_dir / subnet.FILE).unlink()
    written(settings)
    network = find_network("sandbatch", [settings.own_cni_conf_dir])
    assert [one["type"] for one in network.plugins] == ["bridge", "portmap"]


def write_old(settings: Settings, **more: object) -> str:
    """As the release before has written it."""
    ipam = {"type": "host-local", "subnet": "10.88.0.0/16", "routes": [{"dst": "0.0.0.0/0"}]}
    ipam["dataDir"] = str(settings.cni_cache_dir / "networks")
    plugin = {"type": "bridge", "bridge": "sandbatch0", "isGateway": True, "ipMasq": True, "ipam": ipam}
    text = json.dumps({"cniVersion": "1.0.0", "name": "sandbatch", "plugins": [plugin | more]}, indent=2)
    settings.own_cni_conf_dir.mkdir(parents=True, exist_ok=True)
    (settings.own_cni_conf_dir / subnet.FILE).write_text(text + "\n")
    return text + "\n"


def test_a_file_of_the_release_before_is_raised_and_keeps_bridge_and_subnet(settings):
    write_old(settings)
    assert subnet.lacks_ports(settings)
    plugin = written(settings)
    assert (plugin["bridge"], plugin["ipam"]["subnet"]) == ("sandbatch0", "10.88.0.0/16")
    assert "portMappings" in advertised(find_network("sandbatch", [settings.own_cni_conf_dir]))
    assert not subnet.lacks_ports(settings)


def test_with_a_sandbox_on_it_it_stays_and_that_is_known(settings):
    """Its file may be changed only while nobody is on it."""
    text = write_old(settings)
    spec = make_spec(args=["true"])
    known = journals.create(settings.sandboxes_dir, "sb-0123456789abcdef", attempt=1, batch="b", spec=spec)
    file = subnet.ensure_network(settings)
    assert file.read_text() == text
    assert subnet.lacks_ports(settings)
    known.set_facts(final="exited")
    assert subnet.ensure_network(settings).read_text() != text


def test_one_that_somebody_has_changed_stays(settings):
    text = write_old(settings, mtu=1400)
    assert subnet.ensure_network(settings).read_text() == text
    assert not subnet.lacks_ports(settings)
