"""Named network namespaces, as `ip netns` has them: a file below /var/run/netns with the netns mounted on it."""

import errno
import os
import threading
from collections.abc import Callable
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkError

from worker.errors import SandbatchError

NETNS_DIR = Path("/var/run/netns")
NSFS_MAGIC_TYPE = "nsfs"
IFA_F_NODAD = 0x02  # without it an IPv6 address is tentative for up to 3 s (DESIGN, point 9)
PEER_PREFIX = "sbpeer"  # other end of a link that stands in for one that is gone; both go with the netns


def netns_path(container_id: str) -> Path:
    return NETNS_DIR / container_id


def create_netns(container_id: str) -> None:
    """Create the named netns with its loopback up. Safe to repeat, and after a half-done call."""
    if not netns_exists(container_id):
        # A killed worker may have left the mount point without its mount.
        netns_path(container_id).unlink(missing_ok=True)
        try:
            netns.create(container_id)
        except OSError as error:
            raise SandbatchError(
                f"netns {container_id}", str(error.strerror), "see dmesg, and that root runs this"
            ) from error
    _inside(netns_path(container_id), lambda ipr: ipr.link("set", index=1, state="up"))


def delete_netns(container_id: str) -> None:
    """Delete the netns and with it every link inside. Safe to repeat, and after a half-done create."""
    path = netns_path(container_id)
    try:
        if netns_exists(container_id):
            netns.remove(container_id)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SandbatchError(f"netns {container_id}", str(error.strerror), f"see findmnt {path}") from error


def netns_exists(container_id: str) -> bool:
    """Whether the name really holds a netns: the file alone is a half-made one."""
    return str(netns_path(container_id).resolve()) in _nsfs_mounts()


def list_netns() -> list[str]:
    """The names below /var/run/netns, half-made ones included."""
    try:
        return sorted(os.listdir(NETNS_DIR))
    except FileNotFoundError:
        return []


def put_world_back(path: Path, if_name: str, result: dict[str, Any]) -> None:
    """Make a netns as ADD left it, so that the plugins' DEL finds what it has to undo.

    gVisor's netstack takes the addresses off the link, a reboot takes the netns, and the bridge
    plugin finds its masquerade rules by the addresses in the netns alone, ignoring `prevResult`
    (measured; CNI.md, "DEL when things are already gone"). What is missing is made again: the
    netns, the link (a veth pair inside it), the addresses of `result`.
    """
    if path.parent == NETNS_DIR and not netns_exists(path.name):
        create_netns(path.name)
    _inside(path, lambda ipr: _put_link_back(ipr, if_name, addresses_of(result, if_name)))


def _put_link_back(ipr: IPRoute, if_name: str, addresses: list[str]) -> None:
    found = ipr.link_lookup(ifname=if_name)
    if not found:
        ipr.link("add", ifname=if_name, kind="veth", peer={"ifname": f"{PEER_PREFIX}0"})
        found = ipr.link_lookup(ifname=if_name)
    for address in addresses:
        interface = ip_interface(address)
        flags = {"flags": IFA_F_NODAD} if interface.version == 6 else {}
        prefixlen = interface.network.prefixlen
        try:
            ipr.addr("add", index=found[0], address=str(interface.ip), prefixlen=prefixlen, **flags)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise


def addresses_of(result: dict[str, Any], if_name: str) -> list[str]:
    """The addresses, with their prefix length, that a CNI result has for one link of the sandbox.

    Those that name no interface, or an unknown one, count: a plain IPAM chain has no `interfaces`.
    """
    interfaces = result.get("interfaces") or []
    own = {
        number for number, one in enumerate(interfaces) if one.get("sandbox") and one.get("name") == if_name
    }
    ips = result.get("ips") or []
    mine = [one["address"] for one in ips if one.get("interface") in own]
    return mine or [one["address"] for one in ips if one.get("interface") is None or not own]


def _inside(path: Path, act: Callable[[IPRoute], None]) -> None:
    """Run `act` with a netlink socket of another netns.

    A thread of its own enters it, and ends there. pyroute2's way, a child process for each socket,
    costs 4 ms, leaves a ResourceWarning, and fails in the children of a Celery pool; and it opens
    its sockets late, so the whole act belongs in the thread.
    """
    errors: list[Exception] = []

    def enter_and_act() -> None:
        try:
            netns.setns(str(path))
            with IPRoute() as ipr:
                act(ipr)
        except Exception as error:  # noqa: BLE001 - it is raised again, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=enter_and_act, name=f"netns {path.name}")
    thread.start()
    thread.join()
    if errors:
        words = getattr(errors[0], "strerror", None) or errors[0]
        raise SandbatchError(f"netns {path.name}", str(words), "see ip netns list") from errors[0]


def _nsfs_mounts() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    fields = (line.split(" ") for line in lines if f" - {NSFS_MAGIC_TYPE} " in line)
    return {one[4].encode().decode("unicode_escape") for one in fields}
