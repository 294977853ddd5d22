"""Where the bench runs: namespaces, folders and settings of its own, and nothing left of them.

A running sandbatch is never disturbed: the bench has its own network namespace (bridge, addresses,
firewall), its own /run/netns, its own folders, its own broker.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
import typer
from kombu.exceptions import OperationalError
from pyroute2 import IPRoute

from worker import journal
from worker.audit import Finding, audit
from worker.errors import BadInput, HostNotReady, SandbatchError
from worker.launch import undo_all, want_end
from worker.netns import NETNS_DIR
from worker.settings import Settings, load_settings
from worker.stages import Host
from worker.subnet import ensure_network

INSIDE = "BENCH_INSIDE"
# Journals and leases on the disk, sockets in memory, as a host has them: fsync is part of the cost.
DISK, MEMORY = Path("/var/tmp"), Path("/run")  # noqa: S108 - a folder with a random name inside
PREFIX = "sandbatch-bench-"


def enter_own_namespaces() -> None:
    """Start this program again in network and mount namespaces of its own, under `tini -s`.

    tini reaps the sandboxes of the bare half; a worker brings its own. `slave`, not `private`: what
    others unmount meanwhile must go here, too, or their network namespaces would live on with us.

    Raises:
        BadInput: Not root.
        HostNotReady: A program is missing.
    """
    if os.environ.pop(INSIDE, None) is not None:
        NETNS_DIR.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "sandbatch-bench", NETNS_DIR], check=True)
        with IPRoute() as ipr:
            ipr.link("set", index=1, state="up")
        return
    if os.geteuid() != 0:
        raise BadInput("bench", "root is needed", "run it as root on a host")
    for program in ("unshare", "tini"):
        if shutil.which(program) is None:
            raise HostNotReady(program, "not on the PATH", "run sandbatch setup")
    os.environ[INSIDE] = "1"
    outer = ["unshare", "--net", "--mount", "--propagation", "slave", "--"]
    os.execvp(outer[0], [*outer, "tini", "-s", "--", sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell


def say(words: str) -> None:
    """A line for people; that nobody reads it any more must not end the clearing up."""
    with contextlib.suppress(OSError):
        print(f"bench: {words}", file=sys.stderr, flush=True)


class Ground:
    """Folders and settings of both halves: two hosts that share one network, of the same shape."""

    def __init__(self, at_a_time: int, count: int) -> None:
        self._disk = Path(tempfile.mkdtemp(prefix=PREFIX, dir=DISK))
        self.name = self._disk.name
        self._memory = MEMORY / self.name
        common: dict[str, Any] = {
            "broker_url": "",  # the embedded one, in run_dir
            "host": self.name,
            "slots": at_a_time,
            "capacity": count + at_a_time,
            "network": "sandbatch",
            "cni_conf_dir": self._disk / "net.d",
            "cni_cache_dir": self._disk / "cni",
        }
        self.ours, self.bare = (self._make(half, common) for half in ("ours", "bare"))
        network = ensure_network(self.ours)
        self.bare.own_cni_conf_dir.mkdir(parents=True)
        shutil.copy(network, self.bare.own_cni_conf_dir)

    def environment(self, settings: Settings) -> dict[str, str]:
        """What makes a child read the same settings."""
        names = ("broker_url", "host", "slots", "capacity", "network", "cni_conf_dir", "cni_cache_dir")
        mine = {name: str(getattr(settings, name)) for name in (*names, "state_dir", "run_dir")}
        return {**os.environ, **{f"SANDBATCH_{name.upper()}": value for name, value in mine.items()}}

    def folder(self, name: str) -> Path:
        """A folder more, which goes with the others."""
        made = self._disk / name
        made.mkdir()
        return made

    def clear(self, host: Host) -> list[Finding]:
        """End what a run that broke off has left of our half, and look whether anything remains.

        The folders go, too, unless something remains: then the journals say what it was.
        """
        for known in journal.read_all(self.ours.sandboxes_dir)[0]:
            with journal.locked(self.ours.sandboxes_dir, known.container_id, wait_s=5) as mine:
                want_end(mine, "cancelled")
                try:
                    undo_all(host, mine)
                except SandbatchError as error:
                    say(str(error))
                    continue
                mine.remove()
        findings = [one for settings in (self.ours, self.bare) for one in audit(settings)]
        return findings or self.remove()

    def remove(self) -> list[Finding]:
        """Remove the folders; nothing of a sandbox is there any more, which is what it answers."""
        for folder in (self._disk, self._memory):
            shutil.rmtree(folder, ignore_errors=True)
        return []

    def _make(self, half: str, common: dict[str, Any]) -> Settings:
        return load_settings(state_dir=self._disk / half, run_dir=self._memory / half, **common)


@contextlib.contextmanager
def errors_for_humans() -> Iterator[None]:
    """End the program with a line and an exit code, as the command line does."""
    try:
        yield
    except SandbatchError as error:
        print(f"bench: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except (redis.RedisError, OperationalError) as error:
        print(f"bench: broker: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
