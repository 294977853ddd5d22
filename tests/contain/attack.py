"""Runs of the hostile program, and what it says."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.contain.judge import Bait, Snapshot, difference, machine, snapshot, strangers
from tests.host.system import System
from worker import conmon

Said = dict[str, dict[str, str]]


def parse(text: str) -> Said:
    """What came of each attempt, by place."""
    found: Said = {}
    place = ""
    for line in text.splitlines():
        name, _, result = line.partition(": ")
        if line.startswith("at "):
            place = line.removeprefix("at ")
        elif result and " " not in name:
            found.setdefault(place, {})[name] = result
    return found


@dataclass
class Hostile:
    """The program, and a secret that no sandbox was given."""

    program: Path
    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        self.secret = self.folder / "secret"
        self.secret.write_text(self.token + "\n")

    @cached_property
    def env(self) -> dict[str, str]:
        """What it is told: where the secret lies, and the host's disk."""
        handle = subprocess.run(
            [self.program, "handle", self.secret], capture_output=True, text=True, check=False
        )
        disk = os.stat(self.folder).st_dev
        return {
            "SECRET": str(self.secret),
            "HANDLE": handle.stdout,
            "DISK": f"{os.major(disk)}:{os.minor(disk)}",
        }

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Each attempt's kind, a letter: see `chosen` in hostile.c."""
        done = subprocess.run([self.program, "list"], capture_output=True, text=True, check=True)
        return {name: kind for kind, name in map(str.split, done.stdout.splitlines())}

    def of_kind(self, kinds: str) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind in kinds]

    def bait(self, folder: Path) -> Bait:
        return Bait(self.program, folder, self.env)

    def baits(self, folder: Path) -> None:
        """A bait for each attempt."""
        subprocess.run([self.program, "makes", folder], check=True, env=self.env)

    def natively(self, place: Path, *attempts: str, read_only: bool = False) -> str:
        """Run attempts as root on the host; in a mount and a pid namespace, so that nothing else changes.

        `read_only`: as a bind mount that takes no write.
        """
        argv = [str(self.program), "attack", str(place), "-", *attempts]
        if read_only:
            mounts = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
            argv = ["sh", "-c", mounts, str(place), *argv]
        private = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc")
        done = subprocess.run(
            [*private, *argv], capture_output=True, text=True, check=True, env={**os.environ, **self.env}
        )
        return done.stdout

    @contextmanager
    def running(self, *words: str) -> Iterator[None]:
        """The program on the host, after its orders, until the end of the block."""
        argv = [self.program, *words, "then", "wait"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=self.env) as process:
            try:
                assert process.stdout is not None
                assert any(line == "the end\n" for line in process.stdout)
                yield
            finally:
                process.kill()


class Watch:
    """What a sandbox must not change; `words` says what it has."""

    def __init__(self, hostile: Hostile, *folders: Path, baits: tuple[Bait, ...] = ()) -> None:
        self._folders = (hostile.secret, *folders, *(one.folder for one in baits))
        self._baits = baits
        self._before = self._look()

    def _look(self) -> Snapshot:
        return machine() | snapshot(*self._folders)

    def words(self, system: System, *ids: str) -> list[str]:
        found = difference(self._before, self._look()) + strangers(ids, system.run_dir)
        for bait in self._baits:
            found += [*bait.heard(), *bait.locks()]
        return found


def launch(system: System, hostile: Hostile, *options: str, argv: str, program: str = "/tool/hostile") -> str:
    """A sandbox of the program; its id, once it has said `the end`."""
    env = [word for name, value in hostile.env.items() for word in ("--env", f"{name}={value}")]
    [container_id] = system.run(*env, *options, "--", program, *argv.split(), "then", "wait")
    states = system.wait([container_id], "running")
    assert states == {container_id: "running"}, system.show(container_id)["error"]
    log = system.sandboxes / container_id / "container.log"
    system.wait_until(lambda: "the end" in conmon.tail_log(log, 3).splitlines(), 150, "end of the attempts")
    return container_id


def output(system: System, hostile: Hostile, container_id: str) -> str:
    """All that a sandbox has printed. The secret must not be in it."""
    done = system.cli("logs", container_id)
    assert hostile.token not in done.stdout + done.stderr
    return done.stdout


def tool(hostile: Hostile, folder: Path) -> Path:
    """A folder with the program, to be bound or to be a root."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(hostile.program, folder / "hostile")
    return folder
