"""The OCI bundle of a sandbox: config.json after the OCI runtime specification, by our own code."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from worker import limits
from worker.errors import BadInput, SandbatchError
from worker.mounted import mounts_of
from worker.mounts import lay_out
from worker.rootfs import DEFAULT_PATH, host_mounts, host_path, is_host, root_of
from worker.settings import Settings
from worker.spec import Spec
from worker.spec_parts import KERNELS_OWN
from worker.tree import Tree

OCI_VERSION = "1.0.2"
NOFILE = 65536
# A part of docker's set: what an ordinary program run as root expects of its own files and processes.
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
    *("CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID"),
)
# As runc's callers have it (moby, podman). The runscs of 2024 and 2026 do nothing with either: what of it
# they have at all is empty, or of the sandbox's own kernel (tests/host/test_least.py).
MASKED = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/devices/virtual/powercap", "/sys/firmware", "/proc/sentry-meminfo"),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# None of these needs a folder in the rootfs: gVisor makes the mount points in its own memory. A bind
# does need one: see worker.mounts.
MOUNTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", ("nosuid", "mode=755")),
    ("/dev/pts", "devpts", ("nosuid", "noexec")),
    ("/dev/shm", "tmpfs", ("nosuid", "noexec", "nodev", "mode=1777")),  # noqa: S108 - the sandbox's own
    ("/sys", "sysfs", ("ro", "nosuid", "noexec", "nodev")),
)
SCRATCH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("/tmp", "tmpfs", ("nosuid", "nodev", "mode=1777")),  # noqa: S108 - the sandbox's own
    ("/run", "tmpfs", ("nosuid", "nodev", "mode=755")),
)
VAR_TMP = ("/var/tmp", "tmpfs", ("nosuid", "nodev", "mode=1777"))  # noqa: S108 - the sandbox's own


def make_config(
    spec: Spec, container_id: str, netns_path: Path, settings: Settings, *, build: bool = True
) -> dict[str, Any]:
    """The config.json of a sandbox. Writes nothing but a missing `host` rootfs, and that only if `build`.

    Raises:
        BadInput: The rootfs or a mount is not there or not allowed, or the working directory is not there.
    """
    try:
        layout = lay_out(spec, own_mounts(spec, settings), settings)
    except PermissionError as error:
        raise BadInput(f"bind {error.filename}", "this user may not look at it", "run as root") from None
    rootfs = root_of(spec, settings, layout.points, build=build)
    path = host_path(settings) if is_host(spec) else DEFAULT_PATH
    cgroup = limits.cgroup_of(
        spec, container_id, parent=settings.cgroup_parent, default_pids=settings.default_pids
    )
    user = user_of(spec.user, spec.groups)
    home = "/root" if is_host(spec) and not user["uid"] else "/"
    env = {"PATH": path, "HOME": home, "HOSTNAME": container_id, **spec.env}
    return {
        "ociVersion": OCI_VERSION,
        "hostname": container_id,
        "root": {"path": str(rootfs), "readonly": spec.writable == "no"},
        "process": {
            "terminal": False,
            "user": user,
            "args": list(spec.args),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": spec.cwd,
            "noNewPrivileges": True,
            "capabilities": capabilities_of(user["uid"]),
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": NOFILE, "hard": NOFILE},
                *limits.rlimits(spec),
            ],
        },
        "mounts": layout.mounts,
        "linux": {
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": str(netns_path)},
            ],
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
            **({"cgroupsPath": cgroup, "resources": limits.resources(spec)} if cgroup else {}),
        },
    }


def user_of(text: str, groups: Sequence[int] = ()) -> dict[str, Any]:
    """The OCI user of `UID[:GID]`, and its further groups; without a word root, without a GID root's."""
    uid, _, gid = text.partition(":")
    made: dict[str, Any] = {"uid": int(uid or 0), "gid": int(gid or 0)}
    return {**made, "additionalGids": list(groups)} if groups else made


def capabilities_of(uid: int) -> dict[str, list[str]]:
    """As docker: who is not root has none, and could get back no more than these."""
    kinds = ("bounding",) if uid else ("bounding", "effective", "permitted")
    return {kind: list(CAPABILITIES) for kind in kinds}


def own_mounts(spec: Spec, settings: Settings) -> list[dict[str, Any]]:
    """What every sandbox has mounted, where its spec has nothing else there."""
    if spec.image is None:
        own = [*MOUNTS, *SCRATCH]
    else:  # what an image has in /tmp and /run is there, as with docker
        own = [*MOUNTS, *(_scratch(spec, settings) if spec.writable == "no" else ())]
    made = [
        {"destination": path, "type": kind, "source": kind, "options": list(options)}
        for path, kind, options in own
    ]
    return [*made, *(host_mounts(settings) if is_host(spec) else ())]


def _scratch(spec: Spec, settings: Settings) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What can be written to though the root is read-only, as with podman; the image's links are followed.

    None where it would hide more than itself, or where something else is.
    """
    tree = Tree(folder=root_of(spec, settings))
    taken = {PurePosixPath("/"), *(PurePosixPath(path) for path, _, _ in MOUNTS)}
    for path, kind, options in (*SCRATCH, VAR_TMP):
        real = tree.real(path)
        if real is None or real in taken or real.parts[1] in KERNELS_OWN:
            continue
        if tree.look(real) not in ("dir", ""):
            continue
        if tree.look(next(one for one in real.parents if tree.look(one))) == "dir":
            taken.add(real)
            yield str(real), kind, options


def write_bundle(bundle_dir: Path, config: dict[str, Any]) -> None:
    """Write config.json, by rename. Safe to repeat.

    Not flushed: a bundle that a power cut tears belongs to a sandbox that the cut has ended.
    """
    bundle_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    writing = bundle_dir / f".config.json.{uuid4().hex}"
    handle = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "w") as out:  # it has the values of the environment
        out.write(json.dumps(config, indent=1))
    writing.replace(bundle_dir / "config.json")


def remove_bundle(bundle_dir: Path) -> None:
    """Remove the bundle folder. Safe to repeat. Never follows a symlink or a mount out of it.

    Raises:
        SandbatchError: Something is mounted in it. Nothing below that was removed.
    """
    try:
        entries = list(os.scandir(bundle_dir))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            _refuse_mount(Path(entry.path))
            remove_bundle(Path(entry.path))
        else:
            _remove_file(Path(entry.path))
    try:
        bundle_dir.rmdir()
    except FileNotFoundError:
        pass  # a twin was faster
    except OSError as error:  # EBUSY: it is itself a mount
        raise SandbatchError(
            f"bundle {bundle_dir}", str(error.strerror), "see findmnt, unmount it"
        ) from error


def _remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # EBUSY: a file bound over it
        raise SandbatchError(f"bundle file {path}", str(error.strerror), "see findmnt") from error


def _refuse_mount(folder: Path) -> None:
    """A bind of the same device looks like a plain folder to stat: only the mount table knows."""
    place = folder.resolve()
    if any(one.point == place for one in mounts_of(os.getpid())):
        raise SandbatchError(f"bundle {folder.parent}", f"{place} is a mount", f"umount {place}")
