"""The life of a sandbox as one table: each stage with its `do` and its `undo`.

    image ──▶ netns ──▶ network ──▶ egress ──▶ bundle ──▶ container ──▶ ready ──▶ running

An undo is safe to repeat and safe after a half-done `do`; `worker.launch` runs the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker import attachments, conmon, egress, limits, loopback, names, netns, ports
from worker import bundle as oci
from worker.cni import CniRuntime
from worker.errors import RunscError
from worker.image_config import labels_of, overrides
from worker.image_store import ImageStore
from worker.journal import Journal, read_all
from worker.overlay import check_overlay, make_overlay_folder, overlay_flag
from worker.rootfs import generations, is_crowded, prune_host_rootfs
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import Spec


@dataclass(frozen=True)
class Host:
    """What the stages need of this host."""

    settings: Settings
    cni: CniRuntime
    runsc: Runsc

    @property
    def conf_dirs(self) -> tuple[Path, Path]:
        return (self.settings.own_cni_conf_dir, self.settings.cni_conf_dir)


def choose_image(host: Host, journal: Journal) -> dict[str, Any]:
    """The image that it uses from now on: nobody may remove it."""
    return {"reference": journal.asked.image, "digest": journal.facts["image_digest"]}


def take_image(host: Host, journal: Journal) -> dict[str, Any]:
    """The rootfs in the store, and what the image's config says where the spec is silent.

    Raises:
        ImageError: It is not here (any more), or its config cannot be used.
    """
    image = ImageStore(host.settings).use(journal.facts["image_digest"])
    return {
        "reference": journal.asked.image,
        "digest": image.digest,
        "rootfs": str(image.rootfs),
        "labels": labels_of(image),
        "spec": overrides(journal.asked, image, host.settings),
    }


def release_image(host: Host, journal: Journal) -> None:
    """Nothing to undo: it is in use as long as the journal has the stage as begun."""


def create_netns(host: Host, journal: Journal) -> dict[str, Any]:
    """Create the named netns, with its loopback up (what the `loopback` plugin does, by netlink)."""
    netns.create_netns(journal.container_id)
    return {"path": str(netns.netns_path(journal.container_id))}


def delete_netns(host: Host, journal: Journal) -> None:
    netns.delete_netns(journal.container_id)


def choose_networks(host: Host, journal: Journal) -> dict[str, Any]:
    """The networks' configurations as ADD will have them: DEL must call the plugins that ADD called."""
    return attachments.plan(journal.spec, host.conf_dirs)


def attach(host: Host, journal: Journal) -> dict[str, Any]:
    """CNI ADD for each network, first to last.

    The sandbox's addresses come from the results, since netstack takes them off the links.
    """
    container_id, spec = journal.container_id, journal.spec
    if spec.publish:
        loopback.close()  # before portmap opens it
        before = journal.facts.get("publish", [])  # a sandbox that is started anew keeps its ports
        journal.set_facts(publish=ports.reserve(host.settings, container_id, spec.publish, before))
    results = [(one, host.cni.cni_add(one.network, one.attachment)) for one in attachments.planned(journal)]
    if len(results) > 1:
        netns.keep_one_default_route(
            netns.netns_path(container_id), [one.attachment.if_name for one, _ in results]
        )
    return attachments.data_of(results)


def detach(host: Host, journal: Journal) -> None:
    """CNI DEL for each network, last to first, with the configuration that its ADD had."""
    for one in reversed(attachments.planned(journal)):
        host.cni.cni_del(one.network, one.attachment, _unfinished(host, journal, one))
    if journal.facts.get("unfinished"):
        journal.set_facts(unfinished=None)
    ports.release(host.settings, journal.container_id)


def _unfinished(host: Host, journal: Journal, one: attachments.Planned) -> dict[str, Any] | None:
    """What an ADD that failed half-way had made of a link: its addresses, noted before the first DEL.

    The bridge plugin finds its rules by the addresses on the link, and takes the link away before the
    rules: a DEL that is killed in between could never be repeated (storm, seed 22).
    """
    if_name = one.attachment.if_name
    if host.cni.is_attached(one.network.name, one.attachment):
        return None  # the cache has ADD's result
    noted = journal.facts.get("unfinished") or {}
    if if_name not in noted:
        there = netns.addresses_on(netns.netns_path(journal.container_id), if_name)
        if not there:
            return None
        noted = {**noted, if_name: there}
        journal.set_facts(unfinished=noted)
    return {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": if_name, "sandbox": str(netns.netns_path(journal.container_id))}],
        "ips": [{"address": address, "interface": 0} for address in noted[if_name]],
    }


def check_host(host: Host, journal: Journal) -> dict[str, Any]:
    """What this host cannot do is refused before anything is made."""
    egress.check_possible(journal.spec, host.conf_dirs)
    if journal.spec.publish:
        loopback.check_possible()
    return {}


def find_links(host: Host, journal: Journal) -> dict[str, Any]:
    return egress.intend(journal)


def load_egress(host: Host, journal: Journal) -> dict[str, Any]:
    """The policy, before anything runs in the netns: there is no moment without it."""
    return egress.load(journal)


def unload_egress(host: Host, journal: Journal) -> None:
    egress.unload(journal)


def plan_bundle(host: Host, journal: Journal) -> dict[str, Any]:
    """Which rootfs it will have: nobody may prune that from now on."""
    check_overlay(journal.spec, host.runsc)
    return {"rootfs": _oci_config(host, journal, build=False)["root"]["path"]}


def make_bundle(host: Host, journal: Journal) -> dict[str, Any]:
    """config.json; the files of names; the rootfs, where it is not made yet, and a writable root's folder."""
    config, own = config_of(host, journal, build=True)
    oci.write_bundle(journal.bundle, config)
    names.write(journal.bundle, own)
    make_overlay_folder(journal.spec, journal.bundle, host.settings)
    if is_crowded(host.settings):
        prune_rootfs(host.settings)
    return {**bundle_data(config), "notes": own.notes}


def bundle_data(config: dict[str, Any]) -> dict[str, Any]:
    """What the stage container and a pruner of rootfs must know of a bundle."""
    cgroup = config["linux"].get("cgroupsPath")
    return {"rootfs": config["root"]["path"], "has_cgroup": cgroup is not None, "cgroup": cgroup}


def prune_rootfs(settings: Settings) -> list[Path]:
    """Remove the generated roots that no journal has. Safe beside launches."""

    def in_use() -> set[Path]:
        journals, errors = read_all(settings.sandboxes_dir)
        if errors:  # of what they hold nothing is known
            return set(generations(settings))
        known = [one for known in journals for one in (known.intents, known.data) if "bundle" in known.begun]
        return {Path(one["bundle"]["rootfs"]) for one in known if "rootfs" in one.get("bundle", {})}

    return prune_host_rootfs(settings, in_use)


def config_of(host: Host, journal: Journal, *, build: bool) -> tuple[dict[str, Any], names.Names]:
    """config.json, and the files of names that it binds."""
    config, links = _oci_config(host, journal, build=build), attachments.attached(journal)
    own = names.names_of(journal.spec, journal.container_id, links, host.settings, journal.bundle)
    return {**config, "mounts": [*config["mounts"], *own.mounts]}, own


def _oci_config(host: Host, journal: Journal, *, build: bool) -> dict[str, Any]:
    path = netns.netns_path(journal.container_id)
    return oci.make_config(journal.spec, journal.container_id, path, host.settings, build=build)


def remove_bundle(host: Host, journal: Journal) -> None:
    oci.remove_bundle(journal.bundle)


def start_container(host: Host, journal: Journal) -> dict[str, Any]:
    """conmon with `runsc create` in a read-only view of the host, then `runsc start`.

    Raises:
        NotContained: runsc has mounted something else than the bundle says, or something writable.
        RunscError: runsc's words, or that the kernel killed it for want of memory.
    """
    container_id, path = journal.container_id, netns.netns_path(journal.container_id)
    runsc = runsc_of(host, journal)
    cgroup = cgroup_of(journal)
    if cgroup:
        limits.prepare(cgroup)
    try:
        conmon.create(runsc, host.settings, container_id, journal.bundle, journal.log_path, path)
        runsc.start(container_id, path)
    except RunscError as error:
        if limits.was_oom_killed(cgroup):
            raise RunscError(error.what, limits.oom_words(journal.spec), "give it more memory") from error
        raise
    return {}


def runsc_of(host: Host, journal: Journal) -> Runsc:
    """The host's runsc with the flags that this sandbox needs."""
    return replace(
        host.runsc,
        overlay=overlay_flag(journal.spec, journal.bundle, host.settings),
        has_cgroup=bool(journal.data.get("bundle", {}).get("has_cgroup")),
    )


def end_container(host: Host, journal: Journal) -> None:
    exit_code = conmon.exit_code(host.settings.exit_dir, journal.container_id)
    facts: dict[str, Any] = {}
    if exit_code is not None and "exit_code" not in journal.facts:
        facts["exit_code"] = exit_code  # it ended by itself: keep the code before the file goes
    if "oom" not in journal.facts and limits.was_oom_killed(cgroup_of(journal)):
        facts["oom"] = True  # and this before the cgroup does
    if facts:
        journal.set_facts(**facts)
    conmon.end_container(
        host.runsc,
        journal.container_id,
        journal.bundle,
        host.settings.exit_dir,
        is_half_made=not journal.is_done("container"),
    )
    if cgroup := cgroup_of(journal):
        limits.remove_cgroups(cgroup)


def cgroup_of(journal: Journal) -> str | None:
    """The cgroup that a sandbox may have; None for one that was spared it."""
    return limits.made_cgroup(journal.data.get("bundle", {}), journal.container_id)


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


def has_image(spec: Spec) -> bool:
    return spec.image is not None


STAGES = (
    Stage("image", do=take_image, undo=release_image, intend=choose_image, applies=has_image),
    Stage("netns", do=create_netns, undo=delete_netns, intend=check_host),
    Stage("network", do=attach, undo=detach, intend=choose_networks),
    Stage("egress", do=load_egress, undo=unload_egress, intend=find_links, applies=egress.is_wanted),
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
