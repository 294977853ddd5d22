"""Client of the runsc command line: one method a verb. `create` goes through worker.conmon."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from worker import process, procs
from worker.errors import HostNotReady, RunscError
from worker.locks import open_private
from worker.settings import Settings

LOG_LIMIT_BYTES = 1 << 20  # of the shared log; without --debug runsc writes one line an error
# The first release whose gofer makes a read-only bind read-only on the host, too (gVisor, 8a1a0408a).
MENDED = "release-20250707.0"
LOCAL_FOLDERS = ("/usr/local/sbin", "/usr/local/bin")
MESSAGE = re.compile(r'"msg":("(?:[^"\\]|\\.)*")')

# DESIGN, point 7: runsc before August 2024 takes any netns of Linux >= 6.11 for the root netns by a
# look into /proc/sys/net/core. Only `start` looks (measured with Debian 13's), so only `start` gets
# a mount namespace in which an empty folder lies there, as seen from the sandbox's netns.
HIDE_SYSCTL = 'nsenter --net="$NETNS" mount --bind "$EMPTY" /proc/sys/net/core && exec "$@"'


@dataclass(frozen=True)
class Runsc:
    """The fields hold for every call. Ids are always full: runsc would take a prefix for another."""

    binary: Path
    root: Path
    platform: str
    network: str
    timeout_s: float
    hides_sysctl: bool
    run_dir: Path
    overlay: str = "none"  # of one sandbox: worker.overlay
    has_cgroup: bool = False  # of one sandbox, whose `create` is to make it: worker.limits

    @classmethod
    def from_settings(cls, settings: Settings, hides_sysctl: bool) -> "Runsc":
        """The runsc of this host.

        Raises:
            HostNotReady: There is none.
        """
        return cls(
            binary=find_binary(settings),
            root=settings.runsc_root,
            platform=settings.runsc_platform,
            network=settings.runsc_network,
            timeout_s=settings.runsc_timeout_s,
            hides_sysctl=hides_sysctl and settings.runsc_network == "sandbox",
            run_dir=settings.run_dir,
        )

    @property
    def log(self) -> Path:
        """Where runsc and its sandboxes write their errors, in JSON, all into one file."""
        return self.run_dir / "runsc.log"

    def global_args(self) -> list[str]:
        """Flags before the verb, the same for every verb."""
        return [
            f"--root={self.root}",  # in one word: worker.procs knows our processes by it
            f"--platform={self.platform}",
            f"--network={self.network}",
            f"--log={self.log}",
            "--log-format=json",
            "--systemd-cgroup=false",
            *([] if self.has_cgroup else ["--ignore-cgroups"]),
            f"--overlay2={self.overlay}",  # the default keeps a filestore inside the rootfs, which is shared
        ]

    @property
    def limits_overlay(self) -> bool:
        """It can hold a writable root to a size; runscs before 2025 cannot."""
        return "[,size=" in _flags(self.binary, self.binary.stat().st_mtime_ns)

    def create_args(self, netns_path: Path) -> list[str]:
        """Flags for `create`: the newest runsc would leave a mount of an empty netns in its root."""
        if "gofer-network-namespace" not in _flags(self.binary, self.binary.stat().st_mtime_ns):
            return self.global_args()
        # The sandbox's own netns is no more than the sandbox has already, and goes when it goes.
        return [*self.global_args(), f"--gofer-network-namespace={netns_path}"]

    def prepare(self) -> None:
        """Make the folders that runsc needs, and set a log that has grown long aside."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._empty_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        # runsc would make it readable for all, and it echoes what programs are given.
        with open(self.log, "a", opener=open_private) as log:
            is_long = os.fstat(log.fileno()).st_size > LOG_LIMIT_BYTES
        if is_long:
            with suppress(FileNotFoundError):  # another process has just set it aside
                self.log.replace(self.log.with_suffix(".log.1"))

    def start_argv(self, container_id: str, netns_path: Path) -> list[str]:
        """What `start` runs."""
        argv = [str(self.binary), *self.global_args(), "start", container_id]
        if self.hides_sysctl:
            env = ["env", f"NETNS={netns_path}", f"EMPTY={self._empty_dir}"]
            hidden = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", HIDE_SYSCTL, "sh"]
            return [*env, *hidden, *argv]
        return argv

    def start(self, container_id: str, netns_path: Path) -> None:
        """Start the command of a created container.

        Raises:
            RunscError: runsc's own words, such as `error finding executable "nope" in PATH`.
        """
        argv = self.start_argv(container_id, netns_path)
        done = process.run(argv, timeout_s=self.timeout_s, env=clean_env(), point="runsc.start")
        self._check("start", container_id, done)

    def state(self, container_id: str) -> dict[str, Any] | None:
        """The OCI state (`status`, `pid`, `bundle`); None for an id that runsc does not know."""
        done = self._run("state", container_id)
        if done.returncode and is_unknown(done.stderr):
            return None
        return dict(json.loads(self._check("state", container_id, done)))

    def gofer_pid(self, container_id: str) -> int:
        """The process that serves the files of a created container: from runsc's own state file.

        Raises:
            RunscError: The file does not say, or its process is not that gofer.
        """
        try:
            pid = int(json.loads(self._state_file(container_id).read_text())["goferPid"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.error("state", container_id, f"its state file names no gofer: {error!r}") from error
        found = procs.identify(pid, self.root)
        if found is None or (found.role, found.container_id) != ("gofer", container_id):
            raise self.error("state", container_id, f"its gofer, process {pid}, has ended")
        return pid

    def kill(self, container_id: str, signal: str) -> None:
        """Send a signal, such as TERM, to the first process of the container."""
        self._check("kill", container_id, self._run("kill", container_id, signal))

    def kill_inside(self, container_id: str, pid: int, signal: str) -> None:
        """Send a signal to one process, by its pid inside the container. Safe for one that has ended."""
        done = self._run("kill", f"--pid={pid}", container_id, signal)
        if done.returncode and "no such process" not in done.stderr:
            self._check("kill", container_id, done)

    def processes(self, container_id: str) -> dict[int, int]:
        """The pids inside a running container, each with its parent's; 0 where runsc itself began it."""
        rows = self._check("ps", container_id, self._run("ps", "--format=table", container_id)).splitlines()
        names = rows[0].split() if rows else []
        pid, parent = (names.index(name) if name in names else -1 for name in ("PID", "PPID"))
        if pid < 0 or parent < 0:
            raise self.error("ps", container_id, f"its table has other columns: {rows[:1]}")
        return {int(row.split()[pid]): int(row.split()[parent]) for row in rows[1:] if row.strip()}

    def delete(self, container_id: str, *, timeout_s: float | None = None) -> None:
        """Kill what runs and forget the container. Safe to repeat, also for an unknown id."""
        done = self._run("delete", "--force", container_id, timeout_s=timeout_s)
        if done.returncode == 0 or is_unknown(done.stderr):
            return
        self._check("delete", container_id, done)

    def list(self) -> Sequence[dict[str, Any]]:
        """The states of all containers below the root."""
        if not self.root.is_dir():
            return []  # before the first sandbox
        return json.loads(self._check("list", "", self._run("list", "--format=json"))) or []

    def version(self) -> str:
        """What runsc says of itself; `VERSION_MISSING` for one built from the Go module."""
        return _version(self.binary, self.binary.stat().st_mtime_ns)

    def error(self, verb: str, container_id: str, text: str) -> RunscError:
        """An error with runsc's own last words out of `text`, what it wrote on stderr."""
        what = " ".join(word for word in ("runsc", verb, container_id) if word)
        return RunscError(what, last_message(text), f"see {self.log}")

    def _state_file(self, container_id: str) -> Path:
        return self.root / f"{container_id}_sandbox:{container_id}.state"

    @property
    def _empty_dir(self) -> Path:
        return self.run_dir / "empty"

    def _run(self, *args: str, timeout_s: float | None = None) -> process.Completed:
        # Pipes are safe here: none of these verbs leaves a process behind, only `create` does.
        argv = [str(self.binary), *self.global_args(), *args]
        point = f"runsc.{args[0]}"
        return process.run(argv, timeout_s=timeout_s or self.timeout_s, env=clean_env(), point=point)

    def _check(self, verb: str, container_id: str, done: process.Completed) -> str:
        if done.returncode:
            raise self.error(verb, container_id, done.stderr or done.stdout)
        return done.stdout


def find_binary(settings: Settings) -> Path:
    """The runsc of the settings, else the first on the PATH that is not old, else the first.

    Raises:
        HostNotReady: There is none.
    """
    if settings.runsc:
        named = shutil.which(settings.runsc)
        found = [Path(named)] if named else []
    else:
        found = _on_path()
    if not found:
        where = f"{settings.runsc}: no such program" if settings.runsc else "not on the PATH"
        raise HostNotReady("runsc", where, "run sandbatch setup, or name it with SANDBATCH_RUNSC")
    if len(found) == 1:
        return found[0].absolute()
    newer = (one for one in found if not is_old(_version(one, one.stat().st_mtime_ns)))
    return next(newer, found[0]).absolute()


def _on_path() -> list[Path]:
    """Every runsc on the PATH, and where an administrator installs one, each file once."""
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *LOCAL_FOLDERS]
    found: dict[Path, Path] = {}
    for folder in folders:
        if named := shutil.which("runsc", path=folder):
            found.setdefault(Path(named).resolve(), Path(named))
    return list(found.values())


def is_old(version: str) -> bool:
    """It is of before `MENDED`, as far as its version has a date: Debian's has, a Go build's has not."""
    date, mended = (re.search(r"\d{8}", text) for text in (version, MENDED))
    return date is not None and mended is not None and date[0] < mended[0]


@lru_cache(maxsize=8)
def _version(binary: Path, mtime_ns: int) -> str:
    """What a runsc says of itself, asked once a process and file."""
    done = process.run([binary, "--version"], timeout_s=30, env=clean_env())
    first = (done.stdout.strip().splitlines() or ["unknown"])[0]
    return first.removeprefix("runsc version ").strip()


def clean_env() -> dict[str, str]:
    """PATH and nothing else: sandboxes keep runsc's environment, and ours has the broker's password."""
    return {"PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")}


def last_message(text: str) -> str:
    """runsc's last words: a panic's first line, else the last JSON `msg`, else the last line."""
    for line in text.splitlines():
        if line.startswith(("panic:", "fatal error:")):
            return line[: process.WORDS]
    messages = MESSAGE.findall(text)
    if messages:
        return str(json.loads(messages[-1], strict=False))[: process.WORDS]
    return process.last_words(text) or "it said nothing"


def is_unknown(text: str) -> bool:
    """runsc says that it has no such container."""
    return "file does not exist" in text or "container does not exist" in text


@lru_cache(maxsize=8)
def _flags(binary: Path, mtime_ns: int) -> str:
    """What `runsc flags` prints, once a process and file: what it can do is asked, not its version."""
    done = process.run([binary, "flags"], timeout_s=30, env=clean_env())
    return done.stdout + done.stderr
