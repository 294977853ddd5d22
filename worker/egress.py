"""Egress policy and isolation of one sandbox: the stage `egress`, loaded after ADD and before anything runs.

What is loaded follows from the spec and from the links that ADD made, as the kernel has them
(`worker.egress_rules` has the rules and their reasons). The links are journaled before the load.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from ipaddress import IPv4Network, IPv6Network, ip_interface
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from worker import netns, nft
from worker.cni_config import find_network
from worker.egress_rules import TABLE, Link, Ruleset, load_text, ruleset, unload_text
from worker.errors import BadInput, BadNetwork, HostNotReady, SandbatchError
from worker.journal import Journal
from worker.spec import Spec

# Main plugins that move a device of the host into the sandbox, or hang one below: past the host's hooks.
NO_HOST_END = ("dummy", "host-device", "ipvlan", "macvlan", "sriov", "tap", "vlan")


def is_wanted(spec: Spec) -> bool:
    return spec.egress is not None or spec.isolate


def check_possible(spec: Spec, conf_dirs: Sequence[Path]) -> None:
    """Refuse what this host cannot do, before anything is made.

    Raises:
        HostNotReady: nft is missing.
        BadInput: A network gives its sandboxes no link with an end on the host.
    """
    if not is_wanted(spec):
        return
    if not nft.is_here():
        raise HostNotReady(
            "egress", "nft is not on the PATH of this host", "run sandbatch setup, or install nftables"
        )
    for name in (one.name for one in spec.networks):
        with suppress(BadNetwork):  # the stage `network` says so
            plugins = {str(one["type"]) for one in find_network(name, conf_dirs).plugins}
            for plugin in sorted(plugins.intersection(NO_HOST_END)):
                raise _no_host_end(f"network {name}", f"plugin {plugin} leaves no end of a link on the host")


def intend(journal: Journal) -> dict[str, Any]:
    """The links that the policy is for: an undo needs their names when they are gone."""
    return {"links": [asdict(one) for one in links_of(journal.container_id)]}


def load(journal: Journal) -> dict[str, Any]:
    """Load the policy in one transaction. Safe to repeat."""
    made = _ruleset(journal)
    nft.load(load_text(made))
    return {"chains": [f"{family} {TABLE} {name}" for family, name in made.chains]}


def unload(journal: Journal) -> None:
    """Remove the policy in one transaction. Safe to repeat, and where only a part of it is there."""
    if not journal.intents.get("egress", {}).get("links"):
        return  # refused, before anything was loaded
    try:
        nft.load(unload_text(_ruleset(journal)))
    except SandbatchError:
        remove_by_id(journal.container_id)  # some of it was not there, and then nothing was deleted
    nft.drop_empty_tables()


def remove_by_id(container_id: str) -> None:
    """Remove whatever an id has in our tables, as they are now."""
    found, mine = nft.held(), Ruleset()
    prefix = f"{container_id}-"
    mine.elements = {key: chain for key, chain in found.elements.items() if chain.startswith(prefix)}
    mine.chains = {key: [] for key in found.chains if key[1].startswith(prefix)}
    mine.sets = {key: "" for key in found.sets if key[1].startswith(prefix)}
    if mine.chains or mine.sets:
        nft.load(unload_text(mine))


def links_of(container_id: str) -> list[Link]:
    """Every link of the sandbox but `lo`, with its end on the host.

    Asked of the kernel, not of the CNI results: what a policy overlooks is open.

    Raises:
        BadInput: A link has no end here.
    """
    path = netns.netns_path(container_id)
    inside = [one for one in netns.links_in(path) if one.get_attr("IFLA_IFNAME") != "lo"]
    theirs = netns.addresses_in(path)
    with IPRoute() as ipr:
        here = {one["index"]: one for one in ipr.get_links()}
        ours = _by_index(ipr.get_addr())
    found = []
    for link in inside:
        name, host_end = str(link.get_attr("IFLA_IFNAME")), here.get(link.get_attr("IFLA_LINK") or 0)
        if _kind(link) != "veth" or host_end is None or host_end.get_attr("IFLA_LINK") != link["index"]:
            raise _no_host_end(f"link {name}", "it has no end on the host")
        master = here.get(host_end.get_attr("IFLA_MASTER") or 0)
        if master is not None and _kind(master) != "bridge":
            raise _no_host_end(f"link {name}", f"its end on the host belongs to a {_kind(master)}")
        addresses = _by_index(theirs).get(link["index"], [])
        subnets = [ip_interface(one).network for one in addresses if not ip_interface(one).is_link_local]
        neighbours = [one for own in ours.values() for one in own if _is_in(one, subnets)]
        found.append(
            Link(
                name=name,
                host_end=str(host_end.get_attr("IFLA_IFNAME")),
                bridge=str(master.get_attr("IFLA_IFNAME")) if master is not None else None,
                mac=str(link.get_attr("IFLA_ADDRESS")),
                addresses=tuple(sorted(addresses)),
                neighbours=tuple(sorted(neighbours)),
            )
        )
    return found


def journaled(journal: Journal) -> list[Link]:
    """The links that the journal has."""
    rows = journal.intents.get("egress", {}).get("links", [])
    lists = ("addresses", "neighbours")
    return [Link(**(row | {name: tuple(row[name]) for name in lists})) for row in rows]


def _ruleset(journal: Journal) -> Ruleset:
    spec = journal.spec
    return ruleset(journal.container_id, journaled(journal), spec.egress, spec.isolate)


def _by_index(addresses: Any) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for one in addresses:
        if one["family"] in (socket.AF_INET, socket.AF_INET6):
            # Of a point-to-point link IFA_ADDRESS is the other end's.
            address = one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS")
            found.setdefault(one["index"], []).append(f"{address}/{one['prefixlen']}")
    return found


def _is_in(address: str, subnets: Sequence[IPv4Network | IPv6Network]) -> bool:
    """By the address alone: ptp gives the host's end one with a prefix length of 32."""
    return any(ip_interface(address).ip in subnet for subnet in subnets)


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info is not None else "device"


def _no_host_end(what: str, why: str) -> BadInput:
    return BadInput(
        what, f"{why}: nothing there can hold its traffic back", "use a bridge or ptp network, or no --egress"
    )
