"""Our own network, `sandbatch`: the shape of gVisor's CNI tutorial, on a subnet that is free on this host."""

import json
import os
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from worker import cni_cache, journal
from worker.cni_config import list_networks
from worker.errors import HostNotReady
from worker.settings import Settings

NAME = "sandbatch"
FILE = "10-sandbatch.conflist"
LIBCNI_DIR = Path("/var/lib/cni")
SHORTEST_PREFIX = 8  # a wider route is a default one: a VPN has 0.0.0.0/1 and 128.0.0.0/1


def ensure_network(settings: Settings) -> Path:
    """Write our network's file where it is missing; one that is there stays as it is.

    But for one that the release before wrote, without ports and rates: with no sandbox on it, it gets these.

    Raises:
        HostNotReady: No private subnet is free.
    """
    file = settings.own_cni_conf_dir / FILE
    if file.exists():
        old = _of_the_release_before(file)
        if old is not None and not _is_used(settings):
            _write(file, {**old, "plugins": _plugins(settings, old["plugins"][0])})
        return file
    with IPRoute() as ipr:
        taken = [*_routes(ipr), *_configured(settings)]
        links = {str(link.get_attr("IFLA_IFNAME")) for link in ipr.get_links()}
    subnet = next((one for one in _candidates() if not any(one.overlaps(other) for other in taken)), None)
    if subnet is None:
        raise HostNotReady(
            f"network {NAME}", "no private subnet is free on this host", f"write {file} by hand"
        )
    bridge = next(f"{NAME}{number}" for number in range(1000) if f"{NAME}{number}" not in links)
    ipam = {"type": "host-local", "subnet": str(subnet), "routes": [{"dst": "0.0.0.0/0"}]}
    if settings.cni_cache_dir != LIBCNI_DIR:  # a host of its own beside the machine's: leases, too
        ipam["dataDir"] = str(settings.cni_cache_dir / "networks")
    plugin = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipMasq": True, "ipam": ipam}
    _write(file, {"cniVersion": "1.0.0", "name": NAME, "plugins": _plugins(settings, plugin)})
    return file


def lacks_ports(settings: Settings) -> bool:
    """Our network's file is the release before's: it publishes no ports, and limits no bandwidth."""
    return _of_the_release_before(settings.own_cni_conf_dir / FILE) is not None


def _plugins(settings: Settings, bridge: dict[str, Any]) -> list[dict[str, Any]]:
    """The bridge, and behind it what a spec may ask for, as far as this host has the plugins.

    Plugins run for every sandbox, whether it asks for them or not: 2.6 ms of CPU for each ADD and each
    DEL of portmap and of bandwidth (measured), of some 260 for a whole life.
    """
    behind = [
        {"type": plugin, "capabilities": {capability: True}}
        for plugin, capability in (("portmap", "portMappings"), ("bandwidth", "bandwidth"))
        if any((folder / plugin).is_file() for folder in settings.cni_paths)
    ]
    return [{**bridge, "capabilities": {"ips": True, "mac": True}}, *behind]


def _of_the_release_before(file: Path) -> dict[str, Any] | None:
    """What is in the file, if it is exactly what that release wrote; an administrator may have changed it."""
    try:
        document = json.loads(file.read_text())
        (plugin,) = document["plugins"]
        ipam = plugin["ipam"]
        wrote = {"type": "host-local", "subnet": ipam["subnet"], "routes": [{"dst": "0.0.0.0/0"}]}
        wrote |= {"dataDir": ipam["dataDir"]} if "dataDir" in ipam else {}
        bridge = {"type": "bridge", "bridge": plugin["bridge"], "isGateway": True, "ipMasq": True}
        is_same = document == {"cniVersion": "1.0.0", "name": NAME, "plugins": [{**bridge, "ipam": wrote}]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if is_same else None


def _is_used(settings: Settings) -> bool:
    journals, errors = journal.read_all(settings.sandboxes_dir)
    if errors or any(one.network == NAME for one in cni_cache.list_entries(settings.cni_cache_dir)):
        return True
    return any(one.name == NAME for known in journals if not known.final for one in known.spec.networks)


def _write(file: Path, document: dict[str, Any]) -> None:
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = file.with_name(f".{FILE}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.rename(file)


def _candidates() -> Iterator[IPv4Network]:
    """Big enough for a full bridge (1,023 ports) and the reuse of addresses that lags behind."""
    yield from (IPv4Network(f"10.{number}.0.0/16") for number in (*range(88, 128), *range(188, 250)))
    yield from (IPv4Network(f"172.{number}.0.0/16") for number in range(20, 32))
    yield from (IPv4Network(f"192.168.{number}.0/20") for number in range(0, 256, 16))


def _routes(ipr: IPRoute) -> list[IPv4Network]:
    routes = ipr.get_routes(family=2)
    found = [(route.get_attr("RTA_DST"), route["dst_len"]) for route in routes]
    return [
        IPv4Network(f"{address}/{length}", strict=False)
        for address, length in found
        if address and length >= SHORTEST_PREFIX
    ]


def _configured(settings: Settings) -> list[IPv4Network]:
    """Subnets of the users' networks: their bridge may not be there yet."""
    found = []
    for network in list_networks([settings.cni_conf_dir])[0].values():
        for text in _subnets([dict(plugin) for plugin in network.plugins]):
            try:
                found.append(IPv4Network(text, strict=False))
            except ValueError:
                pass  # IPv6, or a mistake that their own plugin will speak of
    return found


def _subnets(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, one in value.items():
            if name == "subnet" and isinstance(one, str):
                yield one
            else:
                yield from _subnets(one)
    elif isinstance(value, list):
        for one in value:
            yield from _subnets(one)
