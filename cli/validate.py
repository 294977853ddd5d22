"""What no host can do is refused before anything is enqueued."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.host_record import LIVE
from tasks.room import known_labels, unavailable
from worker import capabilities, limits, names
from worker.bundle import own_mounts
from worker.cni_config import find_network
from worker.errors import BadInput, BadNetwork, HostNotReady
from worker.journal import boot_id
from worker.mounts import check_source, lay_out
from worker.overlay import check_overlay
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import Spec


def validate(spec: Spec, hosts: dict[str, dict[str, Any]], settings: Settings) -> None:
    """Refuse what no host can do, before anything is enqueued.

    On a machine that is a host itself its own files decide; elsewhere what the hosts say of
    themselves. Each host checks again.

    Args:
        hosts: What is known of each host (`Record.all_hosts`), by name. One that is not up counts where
            no other is left.
    Raises:
        BadInput: What is wrong, and what is known.
    """
    limits.check(spec)
    if spec.host is not None and spec.host not in hosts:
        raise BadInput(f"--host {spec.host}", "no such host", f"known: {', '.join(hosts) or 'none'}")
    if spec.host is not None and spec.reschedule:
        raise BadInput("--reschedule", f"--host {spec.host} leaves it no other host", "leave one of them out")
    hosts = _with_labels(spec, hosts)
    wanted = [facts for name, facts in hosts.items() if spec.host in (None, name)]
    wanted = [facts for facts in wanted if facts.get("state", LIVE) == LIVE] or wanted
    is_here = any(one["boot_id"] == boot_id() for one in wanted)
    if is_here or (not hosts and settings.is_broker_embedded):
        _check_here(spec, wanted, settings)
    elif wanted:
        _check_there(spec, wanted)


def warnings(spec: Spec, hosts: dict[str, dict[str, Any]]) -> list[str]:
    """What the user should know of a spec that is right: the only hosts for it take nothing now."""
    if spec.host is None and not spec.on:
        return []
    wanted = [facts for name, facts in _with_labels(spec, hosts).items() if spec.host in (None, name)]
    away = [words for facts in wanted if (words := unavailable(facts))]
    if not away or len(away) < len(wanted):
        return []
    return [f"it waits as queued: {', '.join(away)}"]


def _with_labels(spec: Spec, hosts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The hosts that have the labels which the spec asks for; all where it asks for none."""
    wanted = spec.on.items()
    found = {name: facts for name, facts in hosts.items() if wanted <= (facts.get("labels") or {}).items()}
    if not found and wanted:
        words = ", ".join(f"{name}={value}" for name, value in wanted)
        raise BadInput(f"--on {words}", "no host has these labels", f"known: {known_labels(hosts.values())}")
    return found


def _check_here(spec: Spec, hosts: list[dict[str, Any]], settings: Settings) -> None:
    """By this machine's own files: they are newer than what its worker said of them."""
    if not any(_network_error(spec, facts) is None for facts in hosts):
        conf_dirs = (settings.own_cni_conf_dir, settings.cni_conf_dir)
        found = {one.name: find_network(one.name, conf_dirs) for one in spec.networks}
        capabilities.check(spec, {name: capabilities.advertised(one) for name, one in found.items()})
    with suppress(PermissionError):  # of this user; the host's worker is root and looks again
        if spec.image is not None:  # what is in one, only the host knows, once it has it
            for source in (one.source for one in spec.mounts if one.source is not None):
                check_source(source, settings)
        else:
            lay_out(spec, own_mounts(spec, settings), settings)
            names.check(spec, settings)
    with suppress(HostNotReady):  # which sandbatch hosts says better
        check_overlay(spec, Runsc.from_settings(settings, hides_sysctl=False))
    limits.check_here(spec)


def _check_there(spec: Spec, hosts: list[dict[str, Any]]) -> None:
    errors = [_network_error(spec, facts) for facts in hosts]
    if errors and None not in errors:
        known = sorted({name for facts in hosts for name in facts["networks"]})
        for one in spec.networks:
            if one.name not in known:
                todo = f"known: {', '.join(known) or 'none'}"
                raise BadNetwork(f"network {one.name}", "no host has it", todo)
        raise next(error for error in errors if error is not None)
    if spec.image is None and spec.rootfs != "host":
        allowed = sorted({folder for facts in hosts for folder in facts["rootfs_allow"]})
        if not any(Path(spec.rootfs).is_relative_to(folder) for folder in allowed):
            todo = f"allowed: {', '.join(allowed) or 'none'}"
            raise BadInput(f"--rootfs {spec.rootfs}", "lies in no folder that a host allows", todo)
    allowed = sorted({folder for facts in hosts for folder in facts.get("mount_allow", ())})
    for source in (mount.source for mount in spec.mounts if mount.source is not None):
        if not any(Path(source).is_relative_to(folder) for folder in allowed):
            todo = f"allowed: {', '.join(allowed) or 'none'}"
            raise BadInput(f"bind {source}", "lies in no folder that a host allows", todo)


def _network_error(spec: Spec, facts: dict[str, Any]) -> BadInput | None:
    """Why a host, as it speaks of itself, cannot attach a sandbox as the spec asks; None if it can."""
    for one in spec.networks:
        if one.name not in facts["networks"]:
            return BadNetwork(f"network {one.name}", "not every host has it", "name the host with --host")
    known = facts.get("capabilities", {})  # a host of the release before has none
    try:
        capabilities.check(spec, {one.name: known.get(one.name, []) for one in spec.networks})
    except BadInput as error:
        return error
    return None
