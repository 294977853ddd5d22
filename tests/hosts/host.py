"""One host of a fleet: a box with folders of its own that outlive it, and a worker in it."""

import json
import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts.box import Box, begin_box, finish_box
from worker import limits, procs

REPO = Path(__file__).parents[2]
TMP = "/run/tmp"  # the machine's own may hold this repository, and killed workers leave pymp-… there
UPLINK = "eth0"  # the host's end of its link to the control bridge
# /run as a boot leaves it; /var/lib on the host's own disk; and the boot has an id of its own.
BOOT = """
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/netns /run/lock
mkdir -m 1777 "$BOX_TMP"
mount --bind "$BOX_FOLDER/var-lib" /var/lib
mount --bind "$BOX_FOLDER/boot-id" /proc/sys/kernel/random/boot_id
"""


@dataclass
class FleetHost:
    """A host of a fleet. Off (`box` is None) it keeps its disk; `env` is what its worker is told."""

    name: str
    folder: Path
    address: str  # with the length of the prefix
    cgroup_parent: str
    env: dict[str, str]
    box: Box | None = None
    worker: "subprocess.Popen[bytes] | None" = None
    booting: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        (self.folder / "var-lib" / "sandbatch").mkdir(parents=True)

    # -- power ---------------------------------------------------------------------------------------

    def begin_boot(self) -> None:
        """Switch it on; `finish_boot` waits for it. Several boot at the same time."""
        assert self.box is None, f"{self.name} is on"
        (self.folder / "boot-id").write_text(f"{uuid.uuid4()}\n")
        self.booting = begin_box(
            self.name, BOOT, self.folder / "box.log", BOX_FOLDER=str(self.folder), BOX_TMP=TMP
        )

    def finish_boot(self) -> Box:
        assert self.booting is not None
        self.box, self.booting = finish_box(self.name, self.booting), None
        return self.box

    def power_off(self) -> None:
        """Everything on it dies at once; what is on its disk stays. Safe to repeat."""
        if self.box is not None:
            self.box.kill()
        self.box = self.worker = None
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        """They are the machine's: a real host's are gone with its power."""
        for folder in limits.list_cgroups([self.cgroup_parent]):
            folder.rmdir()
        for tree in limits.trees():
            with suppress(FileNotFoundError):
                (tree.mount / self.cgroup_parent).rmdir()

    @property
    def is_on(self) -> bool:
        return self.box is not None

    def on(self) -> Box:
        assert self.box is not None, f"{self.name} is off"
        return self.box

    # -- its worker ----------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SANDBATCH_") or name == "SANDBATCH_RUNSC"  # to try another one
        }
        own = {"PYTHONPATH": str(REPO), "TMPDIR": TMP, "SANDBATCH_CGROUP_PARENT": self.cgroup_parent}
        return {**ours, **own, **self.env}

    def spawn_worker(self) -> None:
        """Start its worker, and wait for nothing."""
        assert self.worker is None or self.worker.poll() is not None, f"{self.name} has a worker"
        self.worker = self.on().spawn(
            *(sys.executable, "-m", "cli", "worker"), log=self.log_path, env=self.environment
        )

    def stop_worker(self) -> None:
        """Stop its worker as `systemctl stop` does; its sandboxes go on."""
        if self.worker is not None and self.worker.poll() is None:
            self._signal(signal.SIGTERM)
            self.worker.wait(100)
        self.worker = None

    def kill_worker(self) -> None:
        """kill -9 of the worker's main process; its sandboxes go on."""
        assert self.worker is not None
        self._signal(signal.SIGKILL)
        self.worker.wait(30)
        self.worker = None

    def _signal(self, number: int) -> None:
        pid = self.on().path("/run/sandbatch/worker.lock").read_text()
        self.on().run("kill", f"-{int(number)}", pid)

    # -- what is on it -------------------------------------------------------------------------------

    def command(self, *args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A sandbatch command on the host itself."""
        argv = (sys.executable, "-m", "cli", *args)
        done = self.on().run(*argv, env=self.environment, check=check)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def audit(self) -> list[str]:
        """What its audit finds, a line each; needs no worker."""
        done = self.command("audit", "--json", check=False)
        rows: list[dict[str, Any]] = json.loads(done.stdout or "null")
        assert done.returncode == (1 if rows else 0), f"{self.name}: {done.stderr}"
        return [f"{self.name}: {row['problem']} {row['kind']} {row['name']}" for row in rows]

    def journals(self) -> list[str]:
        """The ids that its disk has journals of, also while it is off."""
        folder = self.folder / "var-lib" / "sandbatch" / "sandboxes"
        return sorted(one.name for one in folder.glob("sb-*")) if folder.is_dir() else []

    def sandboxes(self) -> set[str]:
        """The ids whose sandbox is a living process on it."""
        if self.box is None:
            return set()
        found = procs.all_sandbox_processes(Path("/run/sandbatch/runsc"))
        return {one.container_id for one in found if one.role == "sandbox" and self.box.holds(one.pid)}

    @property
    def log_path(self) -> Path:
        return self.folder / "worker.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")[-4000:] if self.log_path.is_file() else ""
