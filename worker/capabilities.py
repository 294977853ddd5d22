"""What a spec asks of a network's plugins, as libcni's capability arguments (`runtimeConfig`).

libcni hands an argument only to plugins that mark the capability `true`; what no plugin of a
network advertises would be dropped without a word, so it is refused before anything is made.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from worker.cni_config import Network
from worker.errors import BadInput
from worker.spec import Spec
from worker.spec_parts import Bandwidth, NetworkRequest

PORT_MAPPINGS = "portMappings"
# Capability -> what a network without it does not do, and a plugin that has it.
LACKING = {
    PORT_MAPPINGS: ("publishes no ports", "portmap"),
    "bandwidth": ("limits no bandwidth", "bandwidth"),
    "ips": ("takes no address that is asked for", "host-local, static"),
    "mac": ("takes no MAC address that is asked for", "bridge, tuning"),
    "aliases": ("announces no aliases", "dnsname"),
}
# A burst is needed with each rate. A tenth of a second of it lets TCP reach the rate; kubelet's
# 2^32 bits would be half a gigabyte before anything is limited. 64 KiB: a whole GSO packet.
BURST_S, LEAST_BURST_BITS, MOST_BURST_BITS = 0.1, 8 * 65536, 2**32 - 1
# tbf counts the time of a burst in 64 ns ticks, in 32 bits, and the plugin lets it wrap (its source).
LONGEST_BURST_S = 270


def advertised(network: Network) -> set[str]:
    """The capabilities that some plugin of the network marks `true`."""
    found = (plugin.get("capabilities") or {} for plugin in network.plugins)
    return {name for capabilities in found for name, is_on in capabilities.items() if is_on}


def check(spec: Spec, capabilities: Mapping[str, Collection[str]]) -> None:
    """Refuse a spec that asks for what its networks do not advertise; `capabilities` by network.

    Raises:
        BadInput: Names the network, and the capability that its plugins lack.
    """
    if spec.publish and publishing(spec, capabilities) is None:
        raise _lacking(spec.network, PORT_MAPPINGS)
    for request in spec.networks:
        # Rates hold for each link: one without a limit would be a way around those of the others.
        wanted = {"bandwidth": spec.bandwidth, "ips": request.ips, "mac": request.mac}
        for name, value in {**wanted, "aliases": request.aliases}.items():
            if value and name not in capabilities[request.name]:
                raise _lacking(request.name, name)
    for way in ("ingress", "egress"):
        rate, burst = (getattr(spec.bandwidth, f"{way}_{one}", None) for one in ("rate", "burst"))
        if rate and burst and burst > rate * LONGEST_BURST_S:
            why = f"{burst} bits are more than {LONGEST_BURST_S} s of its rate"
            raise BadInput(f"bandwidth {way}_burst", why, f"at most {rate * LONGEST_BURST_S}")


def publishing(spec: Spec, capabilities: Mapping[str, Collection[str]]) -> int | None:
    """Which of the spec's networks its ports are published on: the first that can; None if none can."""
    numbers = range(len(spec.networks))
    return next((one for one in numbers if PORT_MAPPINGS in capabilities[spec.networks[one].name]), None)


def capability_args(spec: Spec, request: NetworkRequest, network: Network) -> dict[str, Any]:
    """The arguments of one attachment, but for its port mappings: the host has yet to choose ports."""
    made: dict[str, Any] = {}
    if spec.bandwidth is not None:
        made["bandwidth"] = _bandwidth(spec.bandwidth)
    if request.ips:
        made["ips"] = list(request.ips)
    if request.mac is not None:
        made["mac"] = request.mac
    if request.aliases:
        # A list, says CNI's CONVENTIONS.md; dnsname, older than that, takes an object by network.
        is_old = any(plugin["type"] == "dnsname" for plugin in network.plugins)
        made["aliases"] = {request.name: list(request.aliases)} if is_old else list(request.aliases)
    return made


def port_mappings(published: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Published ports (`worker.ports`) as portmap takes them; without an address every one is meant."""
    return [
        {
            "hostPort": one["host_port"],
            "containerPort": one["port"],
            "protocol": one["protocol"],
            **({"hostIP": one["host_ip"]} if one["host_ip"] else {}),
        }
        for one in published
    ]


def _bandwidth(asked: Bandwidth) -> dict[str, int]:
    made: dict[str, int] = {}
    for way in ("ingress", "egress"):
        rate, burst = getattr(asked, f"{way}_rate"), getattr(asked, f"{way}_burst")
        if rate:
            usual = min(max(int(rate * BURST_S), LEAST_BURST_BITS), MOST_BURST_BITS)
            made |= {f"{way}Rate": rate, f"{way}Burst": burst or usual}
    return made


def _lacking(network: str, capability: str) -> BadInput:
    words, plugins = LACKING[capability]
    why = f"{words}: its list lacks a plugin with the capability {capability} ({plugins})"
    return BadInput(f"network {network}", why, "add it to the network's file, or do without")
