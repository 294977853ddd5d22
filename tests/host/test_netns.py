"""Named netns as the kernel has them: made, mended and removed, each time or twice."""

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker import netns
from worker.errors import SandbatchError
from worker.spec import new_container_id

pytestmark = pytest.mark.usefixtures("host_parts")


@pytest.fixture
def name() -> Iterator[str]:
    made = new_container_id()
    yield made
    netns.delete_netns(made)


def result(*addresses: str, if_name: str = "eth0", path: Path = Path("/x")) -> dict[str, object]:
    interfaces = [{"name": "veth1"}, {"name": if_name, "sandbox": str(path)}]
    ips = [{"address": address, "interface": 1} for address in addresses]
    return {"cniVersion": "1.0.0", "interfaces": interfaces, "ips": ips}


def shown(name: str, *argv: str) -> str:
    return subprocess.run(["ip", "-n", name, *argv], check=True, capture_output=True, text=True).stdout


def links(name: str) -> list[str]:
    return [line.split(": ")[1].split("@")[0] for line in shown(name, "-o", "link").splitlines()]


def test_create_makes_a_netns_of_its_own_with_loopback_up(name):
    netns.create_netns(name)
    assert netns.netns_exists(name)
    assert not netns.netns_path(name).samefile(netns.OWN_NETNS)
    assert links(name) == ["lo"]
    assert "UP" in shown(name, "link", "show", "lo")
    assert name in netns.list_netns()


def test_create_twice_keeps_the_first(name):
    """A task that Celery hands out twice must not take the netns away from a running sandbox."""
    netns.create_netns(name)
    inode = netns.netns_path(name).stat().st_ino
    shown(name, "link", "set", "lo", "down")
    netns.create_netns(name)
    assert netns.netns_path(name).stat().st_ino == inode
    assert "UP" in shown(name, "link", "show", "lo")


def test_a_half_made_netns_is_made_whole_or_removed(name):
    """A worker killed between the file and the mount leaves a name without a netns."""
    netns.NETNS_DIR.mkdir(exist_ok=True)
    netns.netns_path(name).touch()
    assert not netns.netns_exists(name)
    netns.create_netns(name)
    assert netns.netns_exists(name)
    netns.delete_netns(name)
    netns.netns_path(name).touch()
    netns.delete_netns(name)
    assert name not in netns.list_netns()


def test_delete_is_safe_to_repeat(name):
    netns.create_netns(name)
    netns.delete_netns(name)
    netns.delete_netns(name)
    assert name not in netns.list_netns()


def test_our_own_netns_stays_where_it_is(name):
    """The netns is made in a thread that moves into it; it and no other may move."""
    before = os.stat("/proc/thread-self/ns/net").st_ino
    netns.create_netns(name)
    netns.put_world_back(netns.netns_path(name), "eth0", result("10.231.0.2/24"))
    assert os.stat("/proc/thread-self/ns/net").st_ino == before
    assert not [one for one in threading.enumerate() if one.name.startswith("netns ")]


def test_many_are_made_at_once():
    """All slots of a worker begin with this stage at the same moment."""
    names = [new_container_id() for _ in range(16)]
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(netns.create_netns, names))
        assert set(names) <= set(netns.list_netns())
        assert len({netns.netns_path(name).stat().st_ino for name in names}) == len(names)
    finally:
        for name in names:
            netns.delete_netns(name)


def test_an_impossible_name_is_an_error_that_says_so():
    with pytest.raises(SandbatchError, match=r"netns nnn.*: File name too long"):
        netns.create_netns("n" * 300)


def test_what_is_missing_is_put_back(name):
    path = netns.netns_path(name)
    with netns.world_put_back(path, "eth0", result("10.231.0.2/24", "fd00:231::2/64")):
        assert "inet 10.231.0.2/24" in shown(name, "addr", "show", "dev", "eth0")
        addresses = shown(name, "addr", "show", "dev", "eth0")
        assert "inet6 fd00:231::2/64" in addresses
        assert "tentative" not in addresses  # DAD would hold the plugins up for seconds


def test_a_netns_that_was_made_for_a_del_goes_after_it(name):
    """DEL of a stale attachment has no stage behind it that would delete the netns."""
    with netns.world_put_back(netns.netns_path(name), "eth0", result("10.231.0.2/24")):
        assert netns.netns_exists(name)
    assert name not in netns.list_netns()


def test_a_netns_that_was_made_for_a_del_goes_after_a_failed_one_too(name):
    with pytest.raises(ZeroDivisionError), netns.world_put_back(netns.netns_path(name), "eth0", result()):
        raise ZeroDivisionError
    assert name not in netns.list_netns()


def test_a_link_that_stood_in_goes_after_the_del(name):
    """The netns may be that of a living sandbox, which has other links."""
    netns.create_netns(name)
    with netns.world_put_back(netns.netns_path(name), "eth0", result("10.231.0.2/24")):
        assert set(links(name)) == {"lo", "eth0", "sbpeer0"}
        with netns.world_put_back(netns.netns_path(name), "net1", result("10.231.1.2/24", if_name="net1")):
            assert set(links(name)) == {"lo", "eth0", "sbpeer0", "net1", "sbpeer1"}
    assert links(name) == ["lo"]


def test_a_link_that_is_there_gets_its_addresses_and_stays(name):
    netns.create_netns(name)
    shown(name, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    shown(name, "addr", "add", "10.231.0.2/24", "dev", "eth0")
    with netns.world_put_back(netns.netns_path(name), "eth0", result("10.231.0.2/24", "10.231.0.3/24")):
        pass
    addresses = shown(name, "addr", "show", "dev", "eth0")
    assert addresses.count("10.231.0.2/24") == 1
    assert addresses.count("10.231.0.3/24") == 1


def test_an_address_that_the_kernel_refuses_does_not_stop_a_del(name):
    """IPv6 may be switched off in the netns: ADD cannot have set it, and DEL must not hang on it."""
    with netns.world_put_back(netns.netns_path(name), "eth0", result("::/64", "10.231.0.2/24")):
        assert "10.231.0.2/24" in shown(name, "addr", "show", "dev", "eth0")


def test_a_path_that_is_no_netns_is_left_alone(tmp_path):
    """pyroute2 makes a netns at any path that is missing, and mounts the folder on itself."""
    mounts = Path("/proc/self/mountinfo").read_text()
    for path in (tmp_path / "ns", tmp_path / "file", tmp_path / "no/ns", Path()):
        (tmp_path / "file").touch()
        with netns.world_put_back(path, "eth0", result("10.231.0.2/24")):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file"]
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_the_netns_of_the_host_is_never_mended():
    """A stale entry may name it; its eth0 is not ours."""
    before = subprocess.run(["ip", "-br", "addr"], check=True, capture_output=True).stdout
    with netns.world_put_back(Path("/proc/self/ns/net"), "lo", result("10.231.0.2/24", if_name="lo")):
        assert subprocess.run(["ip", "-br", "addr"], check=True, capture_output=True).stdout == before


def test_run_netns_is_the_same_folder(name):
    """cnitool and podman write /run/netns, `ip netns` /var/run/netns."""
    with netns.world_put_back(Path("/run/netns") / name, "eth0", result("10.231.0.2/24")):
        assert "10.231.0.2/24" in shown(name, "addr", "show", "dev", "eth0")
    assert name not in netns.list_netns()
