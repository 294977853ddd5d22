"""What a launch of a spec would be on this host: `run --dry-run`. Looks at the host and touches nothing.

Each part comes from the functions that a launch uses. What only a launch can know (an address, the
name of a link, a plugin's result) has a placeholder in its place; `unknown` says which.
"""

import os
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from worker import attachments, conmon, egress, loopback, netns
from worker.cni_config import Network
from worker.egress_rules import Link, load_text, ruleset
from worker.errors import HostNotReady, ImageError
from worker.image_config import overrides
from worker.image_entry import Image
from worker.image_ref import parse_image
from worker.image_store import ImageStore
from worker.journal import Journal, now
from worker.launch import with_host_limits
from worker.names import RESOLV_CONF
from worker.overlay import check_overlay
from worker.probe_runsc import remembered
from worker.settings import Settings
from worker.spec import Spec
from worker.stages import Host, bundle_data, check_host, config_of, make_host, runsc_of

CONTAINER_ID = "sb-0000000000000000"
PREV_RESULT = "the result of the plugin before it"
HOST_PORT = "a free port of the host"
NAMESPACE = Path("/proc/PID/fd/FD")
HIDDEN = "(as asked for)"
MAC, HOST_END = "02:00:00:00:00:00", "veth{:08x}"
DOCUMENTS_RANGE = ("192.0.2.2/24", "192.0.2.1/24")  # where the IPAM plugin's range is not known


def dry_run(spec: Spec, settings: Settings) -> dict[str, Any]:
    """All that a launch would hand to runsc, to the CNI plugins and to nft, in JSON's terms.

    Raises:
        BadInput: What the launch would be refused for.
        HostNotReady: This machine lacks something, so it is no host.
        ImageError: The image is not here yet, so that nobody knows what it says.
    """
    known = remembered(settings)
    host = make_host(settings, hides_sysctl=known is not None and known.hides_sysctl)
    asked = with_host_limits(spec, settings)
    journal = _journal(asked, settings)
    check_host(host, journal)
    check_overlay(spec, host.runsc)
    journal.intents[attachments.STAGE] = attachments.plan(spec, host.conf_dirs)
    journal.facts["publish"] = [
        {**one.model_dump(), "host_port": one.host_port or HOST_PORT} for one in spec.publish
    ]
    links = attachments.planned(journal)
    unknown = {"container_id": CONTAINER_ID, "mount namespace": str(NAMESPACE)}
    if spec.image is not None:
        image = _image(spec.image, settings)
        journal.asked = asked.model_copy(update=overrides(asked, image, settings))
        if spec.pull == "always" and not parse_image(spec.image).digest:
            unknown["image"] = image.digest
    if known is None:
        unknown["runsc start"] = "whether it needs its mount trick: run sandbatch doctor"
    firewall = loopback.TEXT if spec.publish else ""
    if egress.is_wanted(spec):
        ends = [link_of(number, one) for number, one in enumerate(links)]
        firewall += load_text(ruleset(CONTAINER_ID, ends, spec.egress, spec.isolate))
        for end in ends:
            unknown |= {f"host end of {end.name}": end.host_end, f"mac of {end.name}": end.mac}
            unknown |= {f"address of {end.name}": ", ".join(end.addresses)}
    config, _ = config_of(host, journal, build=False)
    if not any(one["destination"] == RESOLV_CONF for one in config["mounts"]):
        unknown[RESOLV_CONF] = "a bind of its own, if the result of a network names a server"
    journal.data["bundle"] = bundle_data(config)
    commands = list(_commands(host, journal))
    _hide_values(config, spec)
    return {
        "container_id": CONTAINER_ID,
        "config": config,
        "cni": list(_calls(host, links, unknown)),
        "firewall": firewall,
        "runsc": commands,
        "unknown": unknown,
    }


def _hide_values(config: dict[str, Any], spec: Spec) -> None:
    """What was asked for as environment may be secret, and what is printed goes to logs and screens."""
    pairs = (one.partition("=") for one in config["process"]["env"])
    config["process"]["env"] = [f"{name}={HIDDEN if name in spec.env else value}" for name, _, value in pairs]


def _image(reference: str, settings: Settings) -> Image:
    """The image that a launch would have, if it is on this host already: nothing is pulled for this."""
    store = ImageStore(settings)
    if store.folder.is_dir() and not os.access(store.folder, os.R_OK | os.X_OK):
        raise ImageError(f"image {reference}", "only root may look at the host's images", "run as root")
    digest = store.lookup(parse_image(reference))
    image = store.find(digest) if digest else None
    if image is None:
        why = "is not on this host, and what it says is known after its pull"
        raise ImageError(f"image {reference}", why, f"run sandbatch pull {reference}, then this again")
    return image


def _journal(spec: Spec, settings: Settings) -> Journal:
    """A journal of no sandbox, in no file."""
    folder = settings.sandboxes_dir / CONTAINER_ID
    return Journal(folder, CONTAINER_ID, attempt=1, batch="", boot="", created_at=now(), asked=spec)


def _calls(host: Host, links: list[attachments.Planned], unknown: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The ADD of each plugin of each network, in order."""
    for link in links:
        lacking = host.cni.missing_plugins(link.network)
        if lacking:
            where = f"not found in {host.settings.cni_path}"
            raise HostNotReady(f"CNI plugin {lacking[0]}", where, "run sandbatch setup")
        for call in host.cni.add_calls(link.network, link.attachment, PREV_RESULT):
            if "prevResult" in call["stdin"]:
                unknown["prevResult"] = PREV_RESULT
            yield {"network": link.network.name, "if_name": link.attachment.if_name, **call}


def _commands(host: Host, journal: Journal) -> Iterator[list[str]]:
    """The two programs that a launch starts: conmon, with `runsc create`, and `runsc start`."""
    path, runsc = netns.netns_path(journal.container_id), runsc_of(host, journal)
    where = (journal.container_id, journal.bundle, journal.log_path, path)
    yield conmon.create_argv(NAMESPACE, runsc, host.settings, *where)
    yield runsc.start_argv(journal.container_id, path)


def link_of(number: int, planned: attachments.Planned) -> Link:
    """A link as a bridge or ptp plugin makes it."""
    pairs = list(_ranges(planned.network)) or [DOCUMENTS_RANGE]
    return Link(
        name=planned.attachment.if_name,
        host_end=HOST_END.format(number),
        bridge=_bridge(planned.network),
        mac=MAC,
        addresses=tuple(address for address, _ in pairs),
        neighbours=tuple(gateway for _, gateway in pairs),
    )


def _bridge(network: Network) -> str | None:
    plugins = [plugin for plugin in network.plugins if plugin["type"] == "bridge"]
    return str(plugins[0].get("bridge", "cni0")) if plugins else None


def _ranges(network: Network) -> Iterator[tuple[str, str]]:
    """For each set of ranges of host-local an address of the first, and the gateway's."""
    for plugin in network.plugins:
        ipam = plugin.get("ipam")
        if not isinstance(ipam, dict) or ipam.get("type") != "host-local":
            continue
        for first, *_ in ipam.get("ranges") or [[ipam]]:
            subnet = ip_network(first["subnet"], strict=False)
            address, usual = (subnet[min(one, subnet.num_addresses - 1)] for one in (2, 1))
            gateway = first.get("gateway") or usual
            yield f"{address}/{subnet.prefixlen}", f"{gateway}/{subnet.prefixlen}"
