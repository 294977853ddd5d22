"""CNI GC when a worker starts: what dead sandboxes hold on networks that are wholly ours.

GC frees what no valid attachment has, and only one runtime can know all of these. So a network
counts as ours only if nothing on it, no cache entry and no lease, is of anybody else.
"""

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from worker import cni_cache, journal, netns, procs
from worker.attachments import if_name
from worker.audit import lease_folder
from worker.cni import Attachment, CniRuntime
from worker.cni_cache import CacheEntry
from worker.cni_config import Network, list_networks, network_from_bytes
from worker.errors import BadNetwork, SandbatchError
from worker.mend import detach_orphan, inhabitants, others
from worker.settings import Settings
from worker.spec import CONTAINER_ID
from worker.subnet import NAME

log = logging.getLogger("sandbatch")
LONGEST_S = 30.0  # the worker's start waits for it; what is left is for the next start
PLUGIN_S = 10.0

_Link = tuple[str, str]  # container id, interface
_Use = tuple[str, str, str]  # container id, network, interface


@dataclass(frozen=True)
class _Place:
    """A network, its cache entries and the owners of its leases; None where nobody can know these."""

    network: Network
    entries: list[CacheEntry]
    lessees: set[_Link] | None

    @property
    def links(self) -> set[_Link]:
        return {(entry.container_id, entry.if_name) for entry in self.entries} | (self.lessees or set())

    @property
    def owners(self) -> set[str]:
        return {container_id for container_id, _ in self.links}


def collect(settings: Settings) -> list[SandbatchError]:
    """Run GC for each network that is wholly ours; before this worker takes any message.

    Errors are logged and returned; they never keep the worker from its work. An attachment is
    stale if no journal speaks of it and nothing of its sandbox lives; of a journal that cannot be
    read nothing is claimed, so what is its sandbox's stays until `audit --mend`.
    """
    deadline, errors = time.monotonic() + LONGEST_S, []
    try:
        cni = CniRuntime.from_settings(settings)
        cni = replace(cni, timeout_s=min(cni.timeout_s, PLUGIN_S))
        strangers, places = others(settings), _places(settings)
        in_use, may_be_in_use = _valid(settings)
        for place in places:
            if time.monotonic() > deadline:
                why = f"GC of networks takes longer than {LONGEST_S:g} s"
                raise SandbatchError("CNI GC", why, "it goes on when the worker starts again")
            if _is_ours(place, settings, strangers):
                errors += _collect_one(cni, place, in_use, may_be_in_use, deadline)
    except (SandbatchError, OSError) as error:
        errors.append(error if isinstance(error, SandbatchError) else SandbatchError("CNI GC", str(error)))
    for one in errors:
        log.warning("%s", one)
    return errors


def _collect_one(
    cni: CniRuntime, place: _Place, in_use: set[_Use], may_be_in_use: set[str], deadline: float
) -> list[SandbatchError]:
    network, errors = place.network, []
    valid = {(one, link) for one, name, link in in_use if name == network.name}
    # Somebody's shell, or a process that outlived its sandbox: DEL would take the network from it.
    idle = place.owners - may_be_in_use - {one for one, _ in valid}
    may_be_in_use = may_be_in_use | {one for one in idle if _is_lived_in(netns.netns_path(one))}
    valid |= {one for one in place.links if one[0] in may_be_in_use}
    valid |= {(one, if_name(0)) for one in may_be_in_use}
    for entry in place.entries:
        if (entry.container_id, entry.if_name) in valid or time.monotonic() > deadline:
            continue
        log.info("CNI DEL of %s on %s: no journal has it", entry.container_id, network.name)
        try:
            detach_orphan(cni, entry, place.entries)  # with the configuration of its ADD, not today's
        except SandbatchError as error:
            errors.append(error)
    # A cache entry that is still there has failed above: GC would only fail again, in the same words.
    left = {(entry.container_id, entry.if_name) for entry in place.entries if entry.path.exists()}
    if network.is_at_least("1.1.0") and time.monotonic() <= deadline:
        errors += cni.cni_gc(network, [_attachment(*one) for one in sorted(valid | left)])
    return errors


def _is_lived_in(path: Path) -> bool:
    return path.is_symlink() or bool(inhabitants(path))


def _attachment(container_id: str, link: str) -> Attachment:
    return Attachment(container_id, netns.netns_path(container_id), link)


def _places(settings: Settings) -> list[_Place]:
    """The networks of this host and those of our cache entries, whose file may be gone."""
    entries = cni_cache.list_entries(settings.cni_cache_dir)
    networks = list_networks((settings.own_cni_conf_dir, settings.cni_conf_dir))[0]
    for entry in entries:
        if CONTAINER_ID.fullmatch(entry.container_id):
            with suppress(BadNetwork):
                networks.setdefault(entry.network, network_from_bytes(entry.config))
    return [
        _Place(network, [one for one in entries if one.network == name], _lessees(network, settings))
        for name, network in sorted(networks.items())
    ]


def _lessees(network: Network, settings: Settings) -> set[_Link] | None:
    folder = lease_folder(network, settings)
    if folder is None:
        return None
    return set(_owners(folder.iterdir())) if folder.is_dir() else set()


def _owners(files: Iterable[Path]) -> Iterable[_Link]:
    """A lease's first line is the container's id, its second the interface; old ones have none."""
    for file in files:
        if file.name == "lock" or file.name.startswith("last_reserved_ip"):
            continue
        with suppress(FileNotFoundError):  # freed just now
            owner, *more = file.read_text(errors="replace").split("\n")
            yield owner.strip(), (more[0].strip() if more else "") or if_name(0)


def _is_ours(place: _Place, settings: Settings, strangers: dict[str, str]) -> bool:
    """Nothing on it is another runtime's, nor another sandbatch's, as far as can be known."""
    network = place.network
    if network.disable_gc:
        return False
    if place.lessees is None and not _is_own_file(network, settings):
        return False  # another IPAM plugin: nobody tells who else has an address of it
    if any(not CONTAINER_ID.fullmatch(one) or one in strangers for one in place.owners):
        return False
    return not _has_broken_entries(settings.cni_cache_dir / "results", network.name)


def _is_own_file(network: Network, settings: Settings) -> bool:
    return (
        network.name == NAME and network.file is not None and network.file.parent == settings.own_cni_conf_dir
    )


def _has_broken_entries(results: Path, name: str) -> bool:
    """An entry that cannot be read may be anybody's."""
    names = os.listdir(results) if results.is_dir() else []
    return any(one.startswith(f"{name}-") and cni_cache.read(results / one) is None for one in names)


def _valid(settings: Settings) -> tuple[set[_Use], set[str]]:
    """The attachments that a journal has begun; and the ids of which nothing is known."""
    journals, errors = journal.read_all(settings.sandboxes_dir)
    in_use = {
        (known.container_id, one.name, if_name(number))
        for known in journals
        if "network" in known.begun
        for number, one in enumerate(known.spec.networks)
    }
    readable = {one.container_id for one in journals}
    unreadable = {Path(one.what.removesuffix(f"/{journal.FILE}")).name for one in errors}
    alive = {one.container_id for one in procs.all_sandbox_processes(settings.runsc_root)}
    return in_use, unreadable | (alive - readable)
