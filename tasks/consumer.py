"""What a worker does beside its tasks: host lock, heartbeat, prober, reconcile. A Celery bootstep."""

import ctypes
import fcntl
import logging
import os
import platform
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import redis
from celery import bootsteps
from celery.exceptions import SecurityWarning
from celery.signals import worker_process_init

from tasks import workflow
from tasks.app import settings
from tasks.messages import Order
from tasks.record import HEARTBEAT_S, Record, connect
from tasks.state import TERMINAL, State
from tasks.submit import publish_place
from worker import journal as journals
from worker import reconcile
from worker.cni_config import list_networks
from worker.errors import HostNotReady
from worker.launch import begin_waiting
from worker.prober import Prober
from worker.settings import Settings

log = logging.getLogger("sandbatch")
VERSION = "0.1.0"


def take_host_lock(current: Settings) -> int:
    """Keep a second worker off this host's folders; the kernel drops the lock with the process.

    Raises:
        HostNotReady: Another worker holds it.
    """
    current.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(current.run_dir / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(handle, 32).decode() or "?"
        os.close(handle)
        raise HostNotReady(
            f"host {current.host}", f"another worker (pid {pid}) runs on this machine", "stop it first"
        ) from None
    os.truncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


class HostStep(bootsteps.StartStopStep):
    """Everything that the main process of a worker does for its host."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = threading.Event()

    def start(self, parent: Any) -> None:
        self._settings = settings()
        self._record = Record(connect(self._settings, patient=True))
        self._prober = Prober(self._settings, publish_ready)
        self._prober.start()
        self._started = False
        self._thread = threading.Thread(target=self._live, name="host", daemon=True)
        self._thread.start()

    def stop(self, parent: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._prober.stop()
        try:
            self._record.leave(self._settings.host)
        except redis.RedisError as error:
            log.warning("host %s cannot say that it leaves: %s", self._settings.host, error)

    def _live(self) -> None:
        """Heartbeat every 5 s; what is left over, at once and every `reconcile_s`."""
        due_s = 0.0
        while not self._stop.is_set():
            try:
                self._record.heartbeat(self._settings.host, host_facts(self._settings))
                if due_s <= 0:
                    self._reconcile()
                    due_s = self._settings.reconcile_s
            except (redis.RedisError, OSError) as error:
                log.warning("host %s has no broker: %s", self._settings.host, error)
            due_s -= HEARTBEAT_S
            self._stop.wait(min(HEARTBEAT_S, self._settings.reconcile_s))

    def _reconcile(self) -> None:
        current = self._settings
        look = reconcile.later if self._started else reconcile.at_start
        due = look(current)
        for known in due.relaunch:
            order = Order(container_id=known.container_id, attempt=known.attempt)
            first = next(name for name in workflow.LAUNCH_STAGES if not known.is_done(name))
            workflow.launch_chain(order, first).apply_async()
        for known in due.unwind:
            order = Order(container_id=known.container_id, attempt=known.attempt)
            workflow.step("unwind", order, final=str(known.facts["wanted"])).apply_async()
        for known in due.wait:
            if "ready" not in known.begun:
                with journals.locked(current.sandboxes_dir, known.container_id, wait_s=1) as mine:
                    begin_waiting(mine)
            self._prober.wait_for(known.container_id)
        for known in [*due.report, *due.relaunch, *due.wait]:
            if workflow.report(known) and known.final:
                workflow.forget(known)
        if not self._started:
            self._place_again()
        self._started = True

    def _place_again(self) -> None:
        """Sandboxes that the record has on this host and that no journal knows."""
        host = self._settings.host
        known = {journal.container_id for journal in journals.read_all(self._settings.sandboxes_dir)[0]}
        for container_id in sorted(self._record.placed_on(host) - known):
            sandbox = self._record.get(container_id)
            if sandbox is None or sandbox["state"] in TERMINAL:
                continue
            if sandbox["state"] == State.PLACED:
                publish_place(workflow.app, [(container_id, sandbox["attempt"], host)])
            else:
                error = workflow._json({"stage": "place", "message": "the host has lost its journal"})
                self._record.put(container_id, State.FAILED, sandbox["attempt"], {"error": error}, host=host)


@worker_process_init.connect
def die_with_the_worker(**_: Any) -> None:
    """A pool process must not go on for a killed worker: the next one decides what is due."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(prctl_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def publish_ready(container_id: str, attempt: int, outcome: str, detail: str) -> None:
    """Tell the outcome of a probe by a task on this host's queue, with the errback of a launch."""
    order = Order(container_id=container_id, attempt=attempt)
    signature = workflow.step("ready", order, outcome=outcome, detail=detail)
    signature.on_error(workflow.step("unwind", order, final="failed")).apply_async()


def host_facts(current: Settings) -> dict[str, Any]:
    """What clients may know of this host: room, versions, networks, allowed folders."""
    networks, broken = list_networks((current.own_cni_conf_dir, current.cni_conf_dir))
    journal_count = sum(1 for _ in current.sandboxes_dir.iterdir()) if current.sandboxes_dir.is_dir() else 0
    return {
        "version": VERSION,
        "capacity": current.capacity,
        "sandboxes": journal_count,
        "slots": current.slots,
        "networks": sorted(networks),
        "broken_networks": [str(error) for error in broken],
        "rootfs_allow": [str(path) for path in current.rootfs_allow],
        "kernel": platform.release(),
        "machine_id": machine_id(),
    }


def machine_id() -> str:
    """Which machine this is, so that a client knows whether a host is its own."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def run_worker(concurrency: int | None = None, *, log_level: str = "INFO") -> None:
    """Run this host's worker until it is told to stop; the caller has taken the host lock."""
    current = settings()
    workflow.app.steps["worker"].add(HostStep)
    # The worker is root on purpose: netns, CNI and runsc need it; only JSON is accepted.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    workflow.this_host()  # the probe runs here once, not in each child
    workflow.app.worker_main(
        [
            "worker",
            f"--hostname={current.host}@%h",
            f"--queues=launch,host.{current.host}",
            f"--concurrency={concurrency or current.slots}",
            "--pool=prefork",
            "--without-gossip",
            "--without-mingle",
            f"--loglevel={log_level}",
        ]
    )
