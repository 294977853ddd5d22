"""CPU time of everything that a piece of work has started, children that are gone included."""

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE_FIELDS = (3, 4)  # of the first line of /proc/stat: idle, iowait


class Meter:
    """CPU time by cgroup, where this machine has cgroup v2; else that of the whole machine.

    A cgroup counts what is in it and what was, daemons as well: runsc's sandboxes and gofers are
    nobody's children by the time they end, so no parent's rusage has them. It leaves out the rest
    of a machine that others use. sandbatch makes no cgroups of its own, so all stays where it began.
    """

    def __init__(self, name: str) -> None:
        self._root = _cgroup2_mount()
        self._name = name
        self._old: Path | None = None
        if self._root is not None:
            self._old = self._root / _own_cgroup().lstrip("/")
            self.source = "cgroup"
        else:
            self.source = "machine"

    def enter(self, group: str) -> None:
        """Go into a group: what is started from now on counts for it."""
        if self._old is not None:
            folder = self._folder(group)
            folder.mkdir(exist_ok=True)
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def read(self, *groups: str) -> float:
        """User and system seconds of these groups until now."""
        if self._old is None:
            return _machine_busy_s()
        return sum(_usage_s(self._folder(group)) for group in groups)

    def close(self, *groups: str) -> None:
        """Leave and remove the groups; their processes have ended."""
        if self._old is not None:
            (self._old / "cgroup.procs").write_text(str(os.getpid()))
            for group in groups:
                if self._folder(group).is_dir():
                    self._folder(group).rmdir()

    def _folder(self, group: str) -> Path:
        assert self._old is not None
        return self._old / f"{self._name}-{group}"


def _usage_s(folder: Path) -> float:
    lines = (folder / "cpu.stat").read_text().splitlines()
    return int(dict(line.split() for line in lines)["usage_usec"]) / 1e6


def _machine_busy_s() -> float:
    fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(ticks for number, ticks in enumerate(fields) if number not in IDLE_FIELDS) / TICKS_PER_S


def _cgroup2_mount() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            mount = Path(line.split(" ")[4])
            return mount if os.access(mount / _own_cgroup().lstrip("/"), os.W_OK) else None
    return None


def _own_cgroup() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"
