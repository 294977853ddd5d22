"""The links of a sandbox, eth0, eth1, …

What each is to be is the intent of stage network, what ADD made of it the stage's data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from worker import capabilities, netns
from worker.cni import Attachment, result_ips
from worker.cni_config import Network, find_network, network_from_bytes
from worker.journal import Journal
from worker.spec import Spec

STAGE = "network"


@dataclass(frozen=True)
class Planned:
    """One link as its ADD has it, and so its DEL: the network's configuration of that moment."""

    network: Network
    attachment: Attachment


@dataclass(frozen=True)
class Attached:
    """One link that ADD has made; `ips` without prefix length."""

    if_name: str
    network: str
    ips: list[str]
    result: dict[str, Any]


ATTACHED = tuple(one.name for one in fields(Attached))


def if_name(number: int) -> str:
    return f"eth{number}"


def plan(spec: Spec, conf_dirs: Sequence[Path]) -> dict[str, Any]:
    """The intent: each network as its files have it now, and the capability arguments of each ADD.

    Raises:
        BadInput: There is no such network, or it lacks what the spec asks of it.
    """
    networks = {one.name: find_network(one.name, conf_dirs) for one in spec.networks}
    advertised = {name: capabilities.advertised(network) for name, network in networks.items()}
    capabilities.check(spec, advertised)
    publishing = capabilities.publishing(spec, advertised) if spec.publish else None
    return {
        "attachments": [
            {
                "if_name": if_name(number),
                "config": networks[request.name].whole.decode(),
                "capability_args": capabilities.capability_args(spec, request, networks[request.name]),
                "publishes": number == publishing,
            }
            for number, request in enumerate(spec.networks)
        ]
    }


def planned(journal: Journal) -> list[Planned]:
    """The links that the journal's intent speaks of, in order; none where no ADD can have begun.

    The ports that the host chose are a fact of the journal from just before the ADD.

    Raises:
        BadNetwork: A configuration cannot be read.
    """
    container_id, intent = journal.container_id, journal.intents.get(STAGE, {})
    entries = intent.get("attachments", [])
    if "config" in intent:  # of the release before: one network
        entries = [{"if_name": if_name(0), "config": intent["config"]}]
    found = []
    for entry in entries:
        args = dict(entry.get("capability_args", {}))
        published = journal.facts.get("publish")
        if entry.get("publishes") and published:
            args[capabilities.PORT_MAPPINGS] = capabilities.port_mappings(published)
        network = network_from_bytes(entry["config"].encode(), f"network in the journal of {container_id}")
        path = netns.netns_path(container_id)
        found.append(Planned(network, Attachment(container_id, path, entry["if_name"], capability_args=args)))
    return found


def data_of(results: Sequence[tuple[Planned, dict[str, Any]]]) -> dict[str, Any]:
    """What stage network knows once it is done: `ips` of all links, eth0's first, and eth0's result."""
    made = [
        Attached(one.attachment.if_name, one.network.name, result_ips(result, one.attachment.if_name), result)
        for one, result in results
    ]
    return {
        "ips": [ip for one in made for ip in one.ips],
        "result": made[0].result,
        # The first result stands above: a journal is read often.
        "attachments": [
            (one if number else replace(one, result={})).__dict__ for number, one in enumerate(made)
        ],
    }


def attached(journal: Journal) -> list[Attached]:
    """The links that ADD has made, in order; none before the stage is done."""
    data = journal.data.get(STAGE)
    if data is None:
        return []
    if "attachments" not in data:  # of the release before: one network
        return [Attached(if_name(0), journal.spec.network, data.get("ips", []), data.get("result", {}))]
    first, *others = (Attached(**{name: one[name] for name in ATTACHED}) for one in data["attachments"])
    return [replace(first, result=data.get("result", {})), *others]
