"""Limits of a sandbox: memory and CPU by cgroups, which runsc makes; processes by gVisor's own count.

cgroup v1 has one tree a controller and v2 one for all; the cgroup of a sandbox is `PARENT/ID` in
each, PARENT being the setting `cgroup_parent`. Paths are those of the mounts as this process sees them:
runsc goes by the same ones (gVisor, runsc/cgroup). The folder PARENT stays: a `create` at work may be
about to use it.
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from worker import faults
from worker.errors import BadInput, SandbatchError
from worker.spec import Spec

DEFAULT_PARENT = "sandbatch"
# Measured with the runscs of 2024 and 2026, network and all, 10 starts each, Linux 6.18, 2 cores:
# `echo` needs 13 MiB with the one and 17 with the other, `python3 -c 'print(1)'` 17 and 18.
LEAST_MEMORY = 24 * 2**20
# A start takes 10 s at 0.01 (both, measured), of the 30 s that a verb has; the kernel's least is 1 ms.
LEAST_CPUS = 0.01
CPU_PERIOD_US = 100_000
# runsc insists on these, whichever limit is set.
NEEDED = frozenset({"cpu", "memory"})
NEEDED_V2 = NEEDED | {"cpuset", "io", "pids"}
LEAVE_S = 5.0  # killed processes have left their cgroup within this time
MIB = 2**20


@dataclass(frozen=True)
class Tree:
    """One cgroup hierarchy, where it is mounted."""

    mount: Path
    controllers: frozenset[str]
    is_v2: bool


@lru_cache(maxsize=1)
def trees() -> tuple[Tree, ...]:
    """The cgroup hierarchies of this process, looked up once."""
    return tuple(find_trees(Path("/proc/self/mountinfo").read_text()))


def find_trees(mountinfo: str) -> Iterable[Tree]:
    """The cgroup hierarchies in the text of a mountinfo file."""
    for line in mountinfo.splitlines():
        place, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2) if source.count(" ") >= 2 else ("", "", "")
        if kind not in ("cgroup", "cgroup2"):
            continue
        mount = Path(place.split(" ")[4].encode().decode("unicode_escape"))  # a space stands there as \040
        if kind == "cgroup":
            yield Tree(mount, frozenset(options.split(",")), False)
        else:
            yield Tree(mount, frozenset(_read(mount / "cgroup.controllers").split()), True)


def controllers() -> frozenset[str]:
    """The controllers that runsc can use: those of v1 where there is v1 at all, else those of v2."""
    found = [tree for tree in trees() if tree.mount.is_dir()]
    v1 = [tree.controllers for tree in found if not tree.is_v2]
    return frozenset().union(*(v1 or [tree.controllers for tree in found]))


def is_v2() -> bool:
    return all(tree.is_v2 for tree in trees())


def lacking() -> list[str]:
    """The controllers that runsc needs for any limit by cgroup and this host has not."""
    return sorted((NEEDED_V2 if is_v2() else NEEDED) - controllers())


# -- what a sandbox may use ------------------------------------------------------------------------


def with_defaults(spec: Spec, *, memory_bytes: int | None, cpus: float | None, pids: int | None) -> Spec:
    """The spec with this host's limits where it names none."""
    given = {"memory_bytes": spec.memory_bytes, "cpus": spec.cpus, "pids": spec.pids}
    own = {"memory_bytes": memory_bytes, "cpus": cpus, "pids": pids}
    return spec.model_copy(update={name: own[name] for name, value in given.items() if value is None})


def check(spec: Spec) -> None:
    """Refuse limits with which nothing can start.

    Not a part of the spec's own checks: the least is a measurement and may change, and a journal
    must be readable then.

    Raises:
        BadInput: The limit, and the least that works.
    """
    if spec.memory_bytes is not None and spec.memory_bytes < LEAST_MEMORY:
        why = f"gVisor and a small program do not start in {in_words(spec.memory_bytes)}"
        raise BadInput("memory", why, f"give it {in_words(LEAST_MEMORY)} or more")
    if spec.cpus is not None and spec.cpus < LEAST_CPUS:
        why = f"gVisor does not start in time with {spec.cpus:g}"
        raise BadInput("cpus", why, f"give it {LEAST_CPUS:g} or more")


def check_here(spec: Spec) -> None:
    """Refuse limits that this host cannot enforce.

    Raises:
        BadInput: A limit needs a cgroup controller that is not there.
    """
    wanted = [name for name, value in (("memory", spec.memory_bytes), ("cpus", spec.cpus)) if value]
    if wanted and lacking():
        why = f"this host lacks the cgroup controllers {', '.join(lacking())}"
        raise BadInput(wanted[0], why, "mount them, or leave the limit out")


def cgroup_of(spec: Spec, container_id: str, *, parent: str, default_pids: int | None) -> str | None:
    """The cgroup of a sandbox, as runsc wants it; None for one that is spared it.

    A cgroup costs a launch about 20 ms, so what asks for no limit has none: then `default_pids` is
    held by RLIMIT_NPROC alone.
    """
    asks = spec.memory_bytes is not None or spec.cpus is not None
    if not asks and spec.pids not in (None, default_pids):
        asks = "pids" in controllers() and not lacking()
    return cgroup_path(parent, container_id) if asks else None


def resources(spec: Spec) -> dict[str, Any]:
    """`linux.resources` of config.json."""
    made: dict[str, Any] = {}
    if spec.memory_bytes is not None:
        made["memory"] = {"limit": spec.memory_bytes}
        if _counts_swap():  # memory and swap together: it cannot go on in the swap
            made["memory"]["swap"] = spec.memory_bytes
    if spec.cpus is not None:
        made["cpu"] = {"quota": round(spec.cpus * CPU_PERIOD_US), "period": CPU_PERIOD_US}
    if spec.pids is not None and "pids" in controllers():
        made["pids"] = {"limit": most_host_tasks(spec.pids)}
    return made


def rlimits(spec: Spec) -> list[dict[str, Any]]:
    """`process.rlimits` of config.json.

    gVisor holds a fork bomb to RLIMIT_NPROC as Linux does, with EAGAIN, and the rest of the sandbox
    goes on (both runscs; it counts threads too, and `runsc exec` gets the same limit).
    """
    return [] if spec.pids is None else [{"type": "RLIMIT_NPROC", "soft": spec.pids, "hard": spec.pids}]


def most_host_tasks(pids: int) -> int:
    """The limit of the pids cgroup, which must never be met by who keeps to RLIMIT_NPROC.

    It holds the sentry's threads and the stubs of systrap, and the sandbox dies of it. But RLIMIT_NPROC
    is a user's, and root in a sandbox may setuid: 20 processes became 400 (measured). Each task takes
    up to 3 on the host, above 25 for the sentry on 2 cores (50 tasks: 173; 200: 440, both runscs).
    """
    return 4 * pids + 256 + 16 * (os.cpu_count() or 1)


def _counts_swap() -> bool:
    """Where the kernel has no swap accounting runsc would fail to write the limit.

    v2 has no such file in its root: there the cgroups that are there already tell.
    """
    v1 = [tree.mount for tree in trees() if not tree.is_v2 and "memory" in tree.controllers]
    if v1:
        return any((mount / "memory.memsw.limit_in_bytes").exists() for mount in v1)
    below = [folder for tree in trees() if tree.is_v2 for folder in tree.mount.glob("*/memory.max")]
    return any((file.parent / "memory.swap.max").exists() for file in below)


def in_words(size: int) -> str:
    """A size as people say it, and as the command line takes it."""
    for unit, factor in (("g", 2**30), ("m", MIB), ("k", 2**10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size / MIB:.1f}m" if size >= MIB else f"{size}"


def rough(size: int) -> str:
    """A size as people compare it, with one decimal."""
    for unit, factor in (("g", 2**30), ("m", MIB), ("k", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f}{unit}"
    return str(size)


# -- the cgroup of a sandbox -----------------------------------------------------------------------


def cgroup_path(parent: str, container_id: str) -> str:
    """The cgroup of a sandbox, in any tree."""
    return f"/{parent}/{container_id}"


def made_cgroup(bundle: dict[str, Any], container_id: str) -> str | None:
    """The cgroup that a sandbox was given, whatever the setting is by now; None for one that was spared it.

    `bundle`: what its journal has of that stage. One of release 0.1.0 does not name the cgroup: there was
    only one place.
    """
    if "cgroup" in bundle:
        cgroup: str | None = bundle["cgroup"]
        return cgroup
    return cgroup_path(DEFAULT_PARENT, container_id) if bundle.get("has_cgroup") else None


def prepare(cgroup: str) -> None:
    """Make the folder for all of ours in v2: a runsc that made it would remove it when it fails, from
    under the `create` of another sandbox. In v1 it only removes the sandbox's own."""
    for tree in trees():
        if tree.is_v2 and is_v2():
            _folder(tree, cgroup).parent.mkdir(exist_ok=True)


def was_oom_killed(cgroup: str | None) -> bool:
    """The kernel has killed a process of the sandbox for want of memory. Ask before the cgroup goes.

    With the runsc of 2024 the victim is often one process of the sandbox, and the rest goes on.
    """
    for tree in trees() if cgroup else ():
        if tree.is_v2 or "memory" in tree.controllers:
            name = "memory.events" if tree.is_v2 else "memory.oom_control"
            for line in _read(_folder(tree, str(cgroup)) / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.strip() != "0":
                    return True
    return False


def oom_words(spec: Spec) -> str:
    limit = f"; its limit is {in_words(spec.memory_bytes)}" if spec.memory_bytes else ""
    return f"oom: killed for want of memory{limit}"


def remove_cgroups(cgroup: str, *, timeout_s: float = LEAVE_S) -> None:
    """Remove a sandbox's cgroup from every tree, and end what is still in it. Safe to repeat.

    Raises:
        SandbatchError: A process in it does not die.
    """
    deadline = time.monotonic() + timeout_s
    for tree in trees():
        folder = _folder(tree, cgroup)
        if folder.is_dir():
            faults.point("cgroup.remove.before")
            _remove(folder, deadline)
            faults.point("cgroup.remove.after")


def list_cgroups(parents: Iterable[str]) -> Iterable[Path]:
    """What lies below the parents `parents`, in every tree."""
    for tree in trees():
        for parent in parents:
            with contextlib.suppress(FileNotFoundError):  # or a tree is hidden
                yield from (Path(one.path) for one in os.scandir(tree.mount / parent) if one.is_dir())


def _folder(tree: Tree, cgroup: str) -> Path:
    return tree.mount / cgroup.lstrip("/")


def _remove(folder: Path, deadline: float) -> None:
    pause_s = 0.001
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return  # a twin was faster, or the tree is mounted twice
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                left = _read(folder / "cgroup.procs").split()
                why = f"{error.strerror} (processes {', '.join(left) or 'none'})"
                raise SandbatchError(f"cgroup {folder}", why, "see their kernel stacks") from error
        _kill_all(folder)
        time.sleep(pause_s)  # v1 has no event for "it is empty"; stubs follow the sentry within 1 ms
        pause_s = min(2 * pause_s, 0.1)


def _kill_all(folder: Path) -> None:
    """SIGKILL to what is in a cgroup: the stubs of systrap have no command line to know them by."""
    for pid in filter(str.isdecimal, _read(folder / "cgroup.procs").split()):
        with contextlib.suppress(OSError):  # it has just ended; 0 is one that we cannot see
            handle = os.pidfd_open(int(pid))
            try:
                # Only now, with the pid held, does its cgroup prove whose it is.
                if f"/{folder.parent.name}/{folder.name}" in _read(Path("/proc", pid, "cgroup")):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no such cgroup, or it has just gone
