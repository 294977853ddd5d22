"""Named network namespaces, as `ip netns` has them: a file below /var/run/netns, the netns mounted on it."""

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkError

from worker import faults
from worker.errors import SandbatchError
from worker.own_thread import in_own_thread

NETNS_DIR = Path("/var/run/netns")
OWN_NETNS = Path("/proc/self/ns/net")
IFA_F_NODAD = 0x02  # without it an IPv6 address is tentative for up to 3 s (DESIGN, point 9)
CLONE_NEWNET = 0x40000000
RT_TABLE_MAIN = 254
PEER_NAME = "sbpeer%d"  # other end of a link that stands in for one that is gone; the kernel puts a number


def netns_path(container_id: str) -> Path:
    return NETNS_DIR / container_id


def create_netns(container_id: str) -> None:
    """Create the named netns with its loopback up. Safe to repeat, and after a half-done call."""
    if netns_exists(container_id):
        _inside(netns_path(container_id), _set_loopback_up)
        return

    def create() -> None:
        # A killed worker may have left the mount point without its mount.
        netns_path(container_id).unlink(missing_ok=True)
        if _libc().unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        netns.attach(container_id, "thread-self")
        with IPRoute() as ipr:
            _set_loopback_up(ipr)

    faults.point("netns.create.before")
    _in_thread(container_id, create, "see dmesg, and that root runs this")
    faults.point("netns.create.after")


def delete_netns(container_id: str) -> None:
    """Delete the netns and with it every link inside. Safe to repeat, and after a half-done create."""
    path = netns_path(container_id)
    faults.point("netns.delete.before")
    try:
        if netns_exists(container_id):
            netns.remove(container_id)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SandbatchError(f"netns {container_id}", str(error.strerror), f"see findmnt {path}") from error
    faults.point("netns.delete.after")


def netns_exists(container_id: str) -> bool:
    """Whether the name really holds a netns: the file alone is a half-made one."""
    return _is_netns(netns_path(container_id))


def list_netns() -> list[str]:
    """The names below /var/run/netns, half-made ones included."""
    try:
        return sorted(os.listdir(NETNS_DIR))
    except FileNotFoundError:
        return []


def links_in(path: Path) -> list[Any]:
    """The links of another netns, as pyroute2 has them."""
    found: list[Any] = []
    _inside(path, lambda ipr: found.extend(ipr.get_links()))
    return found


def keep_one_default_route(path: Path, if_names: Sequence[str]) -> None:
    """Of the default routes of each family keep those of the first link in `if_names` that has one.

    Each network's ADD may set one of its own; netstack takes them all (measured), and which of them a
    connection then leaves by is up to each stack: the kernel's prefers the last, netstack the first.
    """
    _inside(path, lambda ipr: _keep_one_default_route(ipr, if_names))


def addresses_in(path: Path) -> list[Any]:
    """The addresses of the links of another netns, as pyroute2 has them."""
    found: list[Any] = []
    _inside(path, lambda ipr: found.extend(ipr.get_addr()))
    return found


def addresses_on(path: Path, if_name: str) -> list[str]:
    """The addresses, with their prefix length, of one link of another netns; none where either is missing."""
    found: list[str] = []

    def look(ipr: IPRoute) -> None:
        for index in ipr.link_lookup(ifname=if_name):
            for one in ipr.get_addr(index=index):
                address = f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}"
                if not ip_interface(address).is_link_local:
                    found.append(address)

    if _is_netns(path):
        _inside(path, look)
    return found


@contextlib.contextmanager
def world_put_back(path: Path, if_name: str, result: dict[str, Any]) -> Iterator[None]:
    """`put_world_back` for the time of a DEL: what was made for it and is left after it goes again.

    A path that is no netns and not below /var/run/netns cannot be mended, and in our own netns
    nothing is mended: the link of that name there is the host's.
    """
    had_netns = _is_netns(path)
    if (not had_netns and not _is_named(path)) or _is_own(path):
        yield
        return
    had_link = put_world_back(path, if_name, result)
    try:
        yield
    finally:
        if not had_netns:
            delete_netns(path.name)
        elif not had_link and _is_netns(path):
            _inside(path, lambda ipr: _remove_link(ipr, if_name))


def put_world_back(path: Path, if_name: str, result: dict[str, Any]) -> bool:
    """Make a netns as ADD left it, so that the plugins' DEL finds what it has to undo.

    gVisor's netstack takes the addresses off the link, a reboot takes the netns, and the bridge
    plugin finds its masquerade rules by the addresses in the netns alone, ignoring `prevResult`
    (measured; CNI.md, "DEL when things are already gone"). What is missing is made again: the
    netns, the link (a veth pair inside it), the addresses of `result` (of CNI 0.3 or later).

    Returns:
        Whether the link was there.
    """
    if _is_named(path) and not _is_netns(path):
        create_netns(path.name)
    found: list[int] = []
    addresses = addresses_of(result, if_name)
    _inside(path, lambda ipr: found.extend(_put_link_back(ipr, if_name, addresses)))
    return bool(found)


def remove_half_made(path: Path) -> None:
    """Remove the name of a netns that holds none: plugins take a missing one for gone, this for an error."""
    if _is_named(path) and path.is_file() and not _is_netns(path):
        delete_netns(path.name)


def _is_named(path: Path) -> bool:
    """Whether the path is that of a named netns; /run/netns is the same folder."""
    return path.is_absolute() and path.parent.resolve() == NETNS_DIR.resolve()


def _is_netns(path: Path) -> bool:
    """By its file system, nsfs, which has one device number for the whole machine."""
    try:
        return path.stat().st_dev == OWN_NETNS.stat().st_dev
    except OSError:
        return False


def _is_own(path: Path) -> bool:
    return path.exists() and path.samefile(OWN_NETNS)


def _put_link_back(ipr: IPRoute, if_name: str, addresses: list[str]) -> list[int]:
    there = list(ipr.link_lookup(ifname=if_name))
    if not there:
        ipr.link("add", ifname=if_name, kind="veth", peer={"ifname": PEER_NAME})
    index = (there or list(ipr.link_lookup(ifname=if_name)))[0]
    for address in addresses:
        interface = ip_interface(address)
        flags = {"flags": IFA_F_NODAD} if interface.version == 6 else {}
        prefixlen = interface.network.prefixlen
        # EEXIST: it is still there. What else the kernel refuses (no IPv6 here) ADD cannot have set either.
        with contextlib.suppress(NetlinkError):
            ipr.addr("add", index=index, address=str(interface.ip), prefixlen=prefixlen, **flags)
    return there


def _keep_one_default_route(ipr: IPRoute, if_names: Sequence[str]) -> None:
    order = [index for name in if_names for index in ipr.link_lookup(ifname=name)]
    for family in (socket.AF_INET, socket.AF_INET6):
        found = [hop for route in ipr.get_routes(family=family) for hop in _default_hops(route)]
        kept = next((index for index in order if any(hop["oif"] == index for hop in found)), None)
        for hop in found:
            if hop["oif"] in order and hop["oif"] != kept:
                ipr.route("del", family=family, dst_len=0, **hop)


def _default_hops(route: Any) -> list[dict[str, Any]]:
    """The ways of one default route; IPv6 shows those of one metric as one route with several."""
    if route["dst_len"] or route.get_attr("RTA_TABLE") != RT_TABLE_MAIN:
        return []
    more = {"priority": metric} if (metric := route.get_attr("RTA_PRIORITY")) else {}
    hops = [(hop["oif"], hop.get_attr("RTA_GATEWAY")) for hop in route.get_attr("RTA_MULTIPATH") or []]
    hops = hops or [(route.get_attr("RTA_OIF"), route.get_attr("RTA_GATEWAY"))]
    return [{"oif": oif, **({"gateway": gateway} if gateway else {}), **more} for oif, gateway in hops]


def _remove_link(ipr: IPRoute, if_name: str) -> None:
    for index in ipr.link_lookup(ifname=if_name):
        ipr.link("del", index=index)


def _set_loopback_up(ipr: IPRoute) -> None:
    ipr.link("set", index=1, state="up")


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
    """Run `act` with a netlink socket of another netns."""

    def enter_and_act() -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # given a path, pyroute2 makes what is missing
        try:
            netns.setns(handle)
        finally:
            os.close(handle)
        with IPRoute() as ipr:
            act(ipr)

    faults.point("netns.inside.before")
    _in_thread(path.name, enter_and_act, "see ip netns list")
    faults.point("netns.inside.after")


def _in_thread(name: str, act: Callable[[], None], todo: str) -> None:
    """Run what changes its netns in a thread of its own, which ends there.

    pyroute2's way, a child process for each socket and each new netns, costs 4 ms, leaves a
    ResourceWarning, and fails in the children of a Celery pool; and it opens its sockets late, so
    the whole act belongs in the thread.
    """
    try:
        in_own_thread(f"netns {name}", act)
    except Exception as error:
        words = getattr(error, "strerror", None) or error
        raise SandbatchError(f"netns {name}", str(words), todo) from error


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
