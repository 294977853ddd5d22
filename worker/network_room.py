"""How many more links the networks of this host can take: ports of its bridges, addresses of its ranges.

Asked before each look for work, so it must be cheap: the files of the networks are read again only once
they have changed; ports and leases are counted by names in a folder.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from worker.audit import lease_folder
from worker.cni_config import Network, list_networks
from worker.settings import Settings

BRIDGE_PORTS = 1023  # of a Linux bridge: 1,024 numbers, of which the first stands for no port
BOUNDLESS = 2**31  # so many addresses are no limit
LINKS = Path("/sys/class/net")


@dataclass(frozen=True)
class _Range:
    """Addresses from `first` to `last`, as numbers; host-local never lends the gateway's."""

    version: int
    first: int
    last: int
    gateway: int

    def holds(self, version: int, number: int) -> bool:
        return version == self.version and self.first <= number <= self.last and number != self.gateway

    @property
    def size(self) -> int:
        return self.last - self.first + 1 - (self.first <= self.gateway <= self.last)


@dataclass(frozen=True)
class _Limits:
    """What bounds a network: a bridge ("": none), and host-local's sets, of each of which a link gets one."""

    bridge: str
    leases: Path | None
    sets: tuple[tuple[_Range, ...], ...]


def network_room(settings: Settings) -> dict[str, int | None]:
    """For each usable network of this host how many more links it can have now; None: no limit is known."""
    rooms: dict[str, int | None] = {}
    ports: dict[str, int] = {}
    for name, limits in _limits(settings).items():
        rooms_here = []
        if limits.bridge:
            if limits.bridge not in ports:
                ports[limits.bridge] = max(0, BRIDGE_PORTS - len(_names(LINKS / limits.bridge / "brif")))
            rooms_here.append(ports[limits.bridge])
        if limits.leases is not None and limits.sets:
            rooms_here.append(_free_addresses(limits.sets, limits.leases))
        least = min(rooms_here, default=BOUNDLESS)
        rooms[name] = least if least < BOUNDLESS else None
    return rooms


def _free_addresses(sets: tuple[tuple[_Range, ...], ...], folder: Path) -> int:
    leased = [found for name in _names(folder) if (found := _number(name)) is not None]
    return min(
        sum(one.size for one in ranges)
        - sum(any(one.holds(*address) for one in ranges) for address in leased)
        for ranges in sets
    )


@lru_cache(maxsize=4096)  # the names of leases come again and again
def _number(name: str) -> tuple[int, int] | None:
    """The file name of a lease as IP version and number; None for host-local's other files."""
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return address.version, int(address)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []  # no bridge yet, no lease yet


# -- the files -----------------------------------------------------------------------------------


_known: tuple[object, dict[str, _Limits]] = (None, {})


def _limits(settings: Settings) -> dict[str, _Limits]:
    """Of all usable networks; from memory while no file has changed."""
    global _known  # one worker has one set of folders
    folders = (settings.own_cni_conf_dir, settings.cni_conf_dir)
    seen = tuple(_stamps(folder) for folder in folders)
    if _known[0] != seen:
        networks, _ = list_networks(folders)
        _known = seen, {name: _limits_of(network, settings) for name, network in networks.items()}
    return _known[1]


def _stamps(folder: Path, depth: int = 1) -> tuple[object, ...]:
    """What tells that a file of the folder, or of a network's own folder in it, has changed."""
    found: list[object] = [str(folder)]
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() and depth:
                    found.append(_stamps(folder / entry.name, depth - 1))
                else:
                    stat = entry.stat()
                    found.append((entry.name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    except OSError:
        found.append(None)  # gone, or not to be read: `list_networks` has the words for it
    return tuple(found)


def _limits_of(network: Network, settings: Settings) -> _Limits:
    bridge = next(
        (str(one.get("bridge") or "cni0") for one in network.plugins if one["type"] == "bridge"), ""
    )
    for plugin in network.plugins:
        ipam = plugin.get("ipam")
        if isinstance(ipam, dict) and ipam.get("type") == "host-local":
            return _Limits(bridge, lease_folder(network, settings), _sets(ipam))
    return _Limits(bridge, None, ())


def _sets(ipam: dict[str, Any]) -> tuple[tuple[_Range, ...], ...]:
    """The sets of ranges (host-local, backend/allocator/config.go); none where they are mistaken.

    The plugin itself has the words for a mistake, at the launch.
    """
    given = [[ipam]] if ipam.get("subnet") else []
    try:
        given += [list(one) for one in ipam.get("ranges") or []]
        return tuple(tuple(_range(one) for one in ranges) for ranges in given)
    except (ValueError, TypeError, AttributeError, KeyError):
        return ()


def _range(given: dict[str, Any]) -> _Range:
    """A range as host-local completes it (backend/allocator/range.go): not the first, nor IPv4's last."""
    subnet = ip_network(given["subnet"], strict=False)
    first = int(ip_address(given["rangeStart"])) if given.get("rangeStart") else int(subnet[0]) + 1
    end = int(subnet[-1]) - (1 if subnet.version == 4 else 0)
    last = int(ip_address(given["rangeEnd"])) if given.get("rangeEnd") else end
    gateway = int(ip_address(given["gateway"])) if given.get("gateway") else int(subnet[0]) + 1
    return _Range(subnet.version, first, last, gateway)
