"""The life of a sandbox as one table: each stage with its `do` and its `undo`.

    netns ──▶ network ──▶ bundle ──▶ container ──▶ ready ──▶ running

An undo is safe to repeat and safe after a half-done `do`; `worker.launch` runs the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker import bundle as oci
from worker import conmon, netns
from worker.cni import Attachment, CniRuntime, result_ips
from worker.cni_config import Network, find_network, network_from_bytes
from worker.journal import Journal, read_all
from worker.overlay import check_overlay, make_overlay_folder, overlay_flag
from worker.rootfs import generations, is_crowded, prune_host_rootfs
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import Spec

IF_NAME = "eth0"


@dataclass(frozen=True)
class Host:
    """What the stages need of this host."""

    settings: Settings
    cni: CniRuntime
    runsc: Runsc

    @property
    def conf_dirs(self) -> tuple[Path, Path]:
        return (self.settings.own_cni_conf_dir, self.settings.cni_conf_dir)


def create_netns(host: Host, journal: Journal) -> dict[str, Any]:
    """Create the named netns, with its loopback up (what the `loopback` plugin does, by netlink)."""
    netns.create_netns(journal.container_id)
    return {"path": str(netns.netns_path(journal.container_id))}


def delete_netns(host: Host, journal: Journal) -> None:
    netns.delete_netns(journal.container_id)


def choose_network(host: Host, journal: Journal) -> dict[str, Any]:
    """The network's configuration as ADD will have it: DEL must call the plugins that ADD called."""
    return {"config": find_network(journal.spec.network, host.conf_dirs).whole.decode()}


def attach(host: Host, journal: Journal) -> dict[str, Any]:
    """CNI ADD; the sandbox's addresses come from its result, since netstack takes them off the link."""
    network = _chosen_network(journal, journal.intents["network"]["config"])
    result = host.cni.cni_add(network, _attachment(journal))
    return {"result": result, "ips": result_ips(result, IF_NAME)}


def detach(host: Host, journal: Journal) -> None:
    """CNI DEL with the configuration that ADD had; its result is in the cache entry."""
    config = journal.intents.get("network", {}).get("config")
    if config is not None:  # else there is no such network: no plugin can have run
        host.cni.cni_del(_chosen_network(journal, config), _attachment(journal))


def plan_bundle(host: Host, journal: Journal) -> dict[str, Any]:
    """Which rootfs it will have: nobody may prune that from now on."""
    check_overlay(journal.spec, host.runsc)
    return {"rootfs": _config(host, journal, build=False)["root"]["path"]}


def make_bundle(host: Host, journal: Journal) -> dict[str, Any]:
    """config.json; its rootfs, where that is not made yet; the folder of a writable root on disk."""
    config = _config(host, journal, build=True)
    oci.write_bundle(journal.bundle, config)
    make_overlay_folder(journal.spec, journal.bundle, host.settings)
    if is_crowded(host.settings):
        prune_rootfs(host.settings)
    return {"rootfs": config["root"]["path"]}


def prune_rootfs(settings: Settings) -> list[Path]:
    """Remove the generated roots that no journal has. Safe beside launches."""

    def in_use() -> set[Path]:
        journals, errors = read_all(settings.sandboxes_dir)
        if errors:  # of what they hold nothing is known
            return set(generations(settings))
        known = [one for known in journals for one in (known.intents, known.data) if "bundle" in known.begun]
        return {Path(one["bundle"]["rootfs"]) for one in known if "rootfs" in one.get("bundle", {})}

    return prune_host_rootfs(settings, in_use)


def _config(host: Host, journal: Journal, *, build: bool) -> dict[str, Any]:
    path = netns.netns_path(journal.container_id)
    return oci.make_config(journal.spec, journal.container_id, path, host.settings, build=build)


def remove_bundle(host: Host, journal: Journal) -> None:
    oci.remove_bundle(journal.bundle)


def start_container(host: Host, journal: Journal) -> dict[str, Any]:
    """conmon with `runsc create`, then `runsc start`."""
    container_id, path = journal.container_id, netns.netns_path(journal.container_id)
    runsc = replace(host.runsc, overlay=overlay_flag(journal.spec, journal.bundle, host.settings))
    conmon.create(runsc, host.settings, container_id, journal.bundle, journal.log_path, path)
    runsc.start(container_id, path)
    return {}


def end_container(host: Host, journal: Journal) -> None:
    exit_code = conmon.exit_code(host.settings.exit_dir, journal.container_id)
    if exit_code is not None and "exit_code" not in journal.facts:
        journal.set_facts(exit_code=exit_code)  # it ended by itself: keep the code before the file goes
    conmon.end_container(host.runsc, journal.container_id, journal.bundle, host.settings.exit_dir)


def confirm_ready(host: Host, journal: Journal) -> dict[str, Any]:
    """Nothing to make: the prober has seen the sandbox answer (`worker.prober`)."""
    return {}


def nothing(host: Host, journal: Journal) -> None:
    """A probe leaves nothing behind."""


def nothing_to_know(host: Host, journal: Journal) -> dict[str, Any]:
    """What the undo needs follows from the sandbox's id."""
    return {}


def always(spec: Spec) -> bool:
    """Most stages are every sandbox's."""
    return True


@dataclass(frozen=True)
class Stage:
    """One step of a launch and what compensates it; `intend` is what the undo must know of the `do`."""

    name: str
    do: Callable[[Host, Journal], dict[str, Any]]
    undo: Callable[[Host, Journal], None]
    intend: Callable[[Host, Journal], dict[str, Any]] = nothing_to_know
    applies: Callable[[Spec], bool] = always  # a spec that asks for nothing of it is spared the task


STAGES = (
    Stage("netns", do=create_netns, undo=delete_netns),
    Stage("network", do=attach, undo=detach, intend=choose_network),
    Stage("bundle", do=make_bundle, undo=remove_bundle, intend=plan_bundle),
    Stage("container", do=start_container, undo=end_container),
    Stage("ready", do=confirm_ready, undo=nothing),
)
STAGE = {stage.name: stage for stage in STAGES}


def stages_of(spec: Spec) -> tuple[Stage, ...]:
    """The stages that a launch of this spec has, first to last."""
    return tuple(stage for stage in STAGES if stage.applies(spec))


def make_host(settings: Settings, *, hides_sysctl: bool) -> Host:
    return Host(settings, CniRuntime.from_settings(settings), Runsc.from_settings(settings, hides_sysctl))


def _chosen_network(journal: Journal, config: str) -> Network:
    return network_from_bytes(config.encode(), f"network in the journal of {journal.container_id}")


def _attachment(journal: Journal) -> Attachment:
    return Attachment(
        container_id=journal.container_id,
        netns_path=netns.netns_path(journal.container_id),
        if_name=IF_NAME,
    )
