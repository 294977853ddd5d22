"""What a host says of itself with each heartbeat."""

import os
import platform
from typing import Any

from tasks.messages import RELEASE
from tasks.puller import no_room
from worker.capabilities import advertised
from worker.cni_config import list_networks
from worker.errors import SandbatchError
from worker.journal import boot_id
from worker.network_room import network_room
from worker.probe_runsc import remembered
from worker.settings import Settings
from worker.spec import KINDS


def host_facts(current: Settings) -> dict[str, Any]:
    """What clients may know of this host: room, versions, networks, labels, allowed folders.

    What the record knows better is added where it is read (`Hosts.all_hosts`).
    """
    networks, broken = list_networks((current.own_cni_conf_dir, current.cni_conf_dir))
    journal_count = sum(1 for _ in current.sandboxes_dir.iterdir()) if current.sandboxes_dir.is_dir() else 0
    return {
        "version": RELEASE,
        "kinds": KINDS,
        "capacity": current.capacity,
        "sandboxes": journal_count,
        "slots": current.slots,
        "memory": current.memory,
        "networks": sorted(networks),
        "network_room": network_room(current),
        "capabilities": {name: sorted(advertised(one)) for name, one in networks.items()},
        "broken_networks": [str(error) for error in broken],
        "rootfs_allow": [str(path) for path in current.rootfs_allow],
        "mount_allow": [str(path) for path in current.mount_allow],
        "kernel": platform.release(),
        "runsc": _runsc_version(current),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "labels": current.labels,
        "not_ready": no_room(current),
        "pulls": True,  # release 0.1.0 waits for messages instead
        "boot_id": boot_id(),  # so that a client knows whether a host is its own machine
    }


def _runsc_version(current: Settings) -> str:
    """Of the file that was probed: nothing is run here, a runsc that hangs must not stop a heart."""
    try:
        known = remembered(current)
    except SandbatchError:
        return ""  # `doctor` has the words for it
    return known.version if known else ""
