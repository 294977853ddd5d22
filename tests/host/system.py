"""A whole sandbatch for a test: broker and worker by `sandbatch up`, in folders of the test's own."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from tasks.connection import connect
from tasks.record import Record
from worker.settings import Settings

START_S = 40.0
PROBE = Path(tempfile.mkdtemp(prefix="sandbatch-tests-")) / "runsc-probe.json"
atexit.register(shutil.rmtree, PROBE.parent, ignore_errors=True)
SERVER = ("--cwd", "/var/www/html", "--ready", "http:8000/", "--", "python3", "-m", "http.server", "8000")

# A CNI plugin that records its calls; a file beside it says how it misbehaves: "VERB exit1|hang|garbage".
FAULTY_PLUGIN = """#!/bin/sh
here=$(dirname "$0")
cat > "$here/stdin.$CNI_COMMAND"
echo "$CNI_COMMAND" >> "$here/calls"
if [ "$CNI_COMMAND" = VERSION ]; then
  echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}'; exit 0
fi
case $(grep "^$CNI_COMMAND " "$here/mode" 2>/dev/null) in
  *exit1)
    echo '{"cniVersion":"1.0.0","code":7,"msg":"no such moon","details":"it is made of cheese"}'
    exit 1 ;;
  *hang) sleep 600 ;;
  *garbage) echo 'segfault at 0x0' ; exit 0 ;;
esac
[ "$CNI_COMMAND" = ADD ] && sed 's/.*"prevResult": *\\({.*}\\).*/\\1/' "$here/stdin.ADD" | python3 -c '
import json, sys
text = sys.stdin.read()
print(json.dumps(json.JSONDecoder().raw_decode(text)[0]))'
exit 0
"""


@dataclass
class System:
    """One host with its broker. `env` is added to the environment of every process."""

    folder: Path
    subnet: str
    env: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    worker_url: str = ""  # a broker elsewhere, as the worker reaches it; then `worker` is run, not `up`
    up: tuple[str, ...] = ()  # options of `up`

    def __post_init__(self) -> None:
        self.conf_dir.mkdir(parents=True, exist_ok=True)
        self.plugins.mkdir(exist_ok=True)
        self.bridge = f"sbt{self.subnet.split('.')[1]}"
        self.network("bridged")
        if PROBE.is_file():  # judge runsc once a session, not once a system
            (self.folder / "state").mkdir()
            shutil.copy2(PROBE, self.folder / "state")

    # -- its parts -----------------------------------------------------------------------------------

    @property
    def conf_dir(self) -> Path:
        return self.folder / "net.d"

    @property
    def plugins(self) -> Path:
        return self.folder / "plugins"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def sandboxes(self) -> Path:
        return self.folder / "state" / "sandboxes"

    @property
    def environment(self) -> dict[str, str]:
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SANDBATCH_") or name == "SANDBATCH_RUNSC"  # to try another one
        }
        return {
            **ours,
            "SANDBATCH_STATE_DIR": str(self.folder / "state"),
            "SANDBATCH_RUN_DIR": str(self.run_dir),
            "SANDBATCH_CNI_CONF_DIR": str(self.conf_dir),
            "SANDBATCH_CNI_CACHE_DIR": str(self.folder / "cni"),
            "SANDBATCH_CNI_PATH": f"{self.plugins}:/opt/cni/bin:/usr/lib/cni",
            "SANDBATCH_NETWORK": "bridged",
            "SANDBATCH_HOST": "test",
            "SANDBATCH_SLOTS": "4",
            "SANDBATCH_RECONCILE_S": "2",
            **self.env,
        }

    def network(self, name: str, *, chain: tuple[str, ...] = (), **ipam: Any) -> None:
        """Write a bridge network with ipMasq; `chain` are plugins behind it."""
        bridge = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "ipMasq": True,
            "ipam": {
                "type": "host-local",
                "subnet": self.subnet,
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(self.folder / "cni" / "networks"),
                **ipam,
            },
        }
        plugins = [bridge, *({"type": one} for one in chain)]
        document = {"cniVersion": "1.0.0", "name": name, "plugins": plugins}
        (self.conf_dir / f"{name}.conflist").write_text(json.dumps(document))

    def own_bridge(self) -> str:
        """The bridge of the network `sandbatch`, which the system made for itself."""
        file = next((self.folder / "state" / "cni" / "net.d").iterdir())
        return str(json.loads(file.read_text())["plugins"][0]["bridge"])

    def faulty_plugin(self, mode: str) -> None:
        """Put the plugin `faulty` into the plugin folder; `mode` as `VERB what`, a line each."""
        plugin = self.plugins / "faulty"
        plugin.write_text(FAULTY_PLUGIN)
        plugin.chmod(0o755)
        (self.plugins / "mode").write_text(mode + "\n")

    # -- what is done to it --------------------------------------------------------------------------

    def start(self, **env: str) -> None:
        """Start broker and worker, and wait for the worker's heartbeat."""
        with (self.folder / "up.log").open("ab") as log:
            argv = [sys.executable, "-m", "cli", *(["worker"] if self.worker_url else ["up", *self.up])]
            environment = {**self.environment, **env}
            if self.worker_url:
                environment["SANDBATCH_BROKER_URL"] = self.worker_url
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.wait_until(lambda: self.is_up(), START_S, "the worker's heartbeat")

    def is_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"sandbatch up ended:\n{self.log()}")
        with self.record() as record:
            try:
                return bool(record.live_hosts())
            except redis.RedisError:
                return False

    @contextlib.contextmanager
    def record(self) -> Iterator[Record]:
        """What the broker knows, seen from the test."""
        url, ca = self.env.get("SANDBATCH_BROKER_URL", ""), self.env.get("SANDBATCH_BROKER_CA")
        current = Settings(run_dir=self.run_dir, broker_url=url, broker_ca=Path(ca) if ca else None)
        with contextlib.closing(connect(current)) as client:
            yield Record(client)

    def events(self) -> list[dict[str, str]]:
        """What the record has told so far of sandboxes, oldest first: id, batch, state, host, t."""
        with self.record() as record:
            return [event for _, event in record.follow("0-0", 0.001) if event["id"]]

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.process = None

    def worker_pid(self) -> int:
        return int((self.run_dir / "worker.lock").read_text())

    def kill_worker(self) -> None:
        """kill -9 of the worker's main process; `up` then ends, too."""
        assert self.process is not None
        os.kill(self.worker_pid(), signal.SIGKILL)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        assert self.process is not None
        self.process.wait(30)
        self.process = None

    def remove(self) -> None:
        """Everything of this system, the bridge too, which CNI leaves on purpose."""
        if self.sandboxes.is_dir() and any(self.sandboxes.iterdir()):
            self.env.pop("SANDBATCH_FAULTS", None)
            if self.process is None or self.process.poll() is not None:
                self.start()
            self.cli("rm", "--all")
        self.stop()
        found = self.folder / "state" / PROBE.name
        if found.is_file():
            shutil.copy2(found, PROBE)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)
        shutil.rmtree(self.folder)

    def clear(self) -> None:
        """Remove all sandboxes; then the audit is clean."""
        self.cli("rm", "--all")
        assert self.audit() == []
        # The record knows of the end before the journal goes: the next test must not find it half there.
        self.wait_until(lambda: not list(self.sandboxes.glob("*")), 10, "the journals' folders to go")

    # -- the command line ----------------------------------------------------------------------------

    def cli(
        self, *args: str, check: bool = True, timeout_s: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "cli", *args]
        done = subprocess.run(
            argv, capture_output=True, text=True, env=self.environment, timeout=timeout_s, check=False
        )
        assert not check or done.returncode == 0, f"{args}: {done.stdout}{done.stderr}\n{self.log()}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def run(self, *args: str) -> list[str]:
        """Enqueue; the ids."""
        return self.cli("run", *args).stdout.split()

    def show(self, container_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("show", container_id, "--json").stdout)
        return found

    def ls(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in json.loads(self.cli("ls", "--all", "--json").stdout)}

    def wait(self, ids: list[str], goal: str, timeout_s: float = 60) -> dict[str, str]:
        """Wait for "running" or "terminal"; the states."""
        self.cli("wait", *ids, "--for", goal, "--timeout", str(timeout_s), check=False)
        rows = self.ls()
        return {one: rows[one]["state"] for one in ids}

    def audit(self) -> list[str]:
        """What the audit finds, a line each; empty is clean, and then it ends 0."""
        done = self.cli("audit", "--json", check=False)
        rows = json.loads(done.stdout)
        assert done.returncode == (1 if rows else 0), done.stderr
        return [f"{row['problem']} {row['kind']} {row['name']}" for row in rows]

    def wait_until(self, is_true: Any, timeout_s: float, what: str) -> None:
        """Look until it is so; for what tells nobody when it happens."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{self.log()}"
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "up.log").read_text(errors="replace")[-6000:]
