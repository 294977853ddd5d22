"""Start this host's Celery worker: one a host, and whatever a dead one left is taken up first."""

import ctypes
import gc as garbage
import logging
import os
import signal
import socket
import sys
import warnings
from typing import Any

from celery import bootsteps
from celery.exceptions import SecurityWarning
from celery.signals import (
    after_task_publish,
    before_task_publish,
    task_postrun,
    task_prerun,
    worker_before_create_process,
    worker_process_init,
)
from celery.worker.control import Panel

from tasks import log_tasks, workflow
from tasks.app import settings
from tasks.connection import connect
from tasks.foreign import foreign
from tasks.host_step import HostStep, host_owner
from tasks.record import Record
from worker import faults, gc, image_audit, reconcile, stages
from worker.errors import HostNotReady
from worker.locks import lock_within
from worker.rootfs import host_rootfs
from worker.settings import Settings

log = logging.getLogger("sandbatch")


class TakeBack(bootsteps.StartStopStep):
    """After a connection that was lost: what it had brought and nobody has begun goes back to its queue.

    Celery drops it, and counts on a broker that notices. What is being worked on comes twice, which its
    journal makes harmless.
    """

    requires = ("celery.worker.consumer.connection:Connection",)
    is_first = True  # the worker's start has taken back what the one before it had

    def start(self, parent: Any) -> None:
        if not type(self).is_first:
            log.info("%d messages of the lost connection are back in their queues", take_back_messages())
        type(self).is_first = False


# What Flower asks. The rest of Celery's remote control would stop or change a worker at the word of anybody
# who can write to the broker, or tell its configuration.
CONTROLS = {"ping", "stats", "active", "reserved", "scheduled", "registered", "active_queues"}
CONTROLS |= {"enable_events", "disable_events", "heartbeat"}

LOCK_WAIT_S = 5.0  # a worker that was just killed takes a moment to be gone
_worker_pid = 0  # of the main process, known in its children by the fork


def take_host_lock(current: Settings) -> int:
    """Keep a second worker off this host's folders; the kernel drops the lock with the process.

    Raises:
        HostNotReady: Another worker holds it.
    """
    current.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(current.run_dir / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not lock_within(handle, LOCK_WAIT_S):
        pid = os.read(handle, 32).decode() or "?"
        os.close(handle)
        raise HostNotReady(
            f"host {current.host}", f"another worker (pid {pid}) runs on this machine", "stop it first"
        )
    os.truncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def take_name(current: Settings) -> None:
    """Keep two machines from working under one name: they would share a queue.

    Raises:
        HostNotReady: Another machine lives under it.
    """
    if not Record(connect(current)).take_name(current.host, host_owner(current)):
        raise HostNotReady(
            f"host {current.host}", "another machine works under this name", "give one of them another --host"
        )


def run_worker() -> None:
    """Run this host's worker until it is told to stop; the caller has taken the host lock."""
    global _worker_pid
    _worker_pid = os.getpid()
    current = settings()
    log_tasks.set_up(current)
    faults.arm(current.faults, current.run_dir)
    if current.metrics_port:
        from tasks.exporter import serve  # with it comes prometheus_client: 1 MB that others need not have

        serve(current)  # first: what it cannot have is refused before anything is begun
    take_name(current)
    HostStep.due_at_start = reconcile.at_start(current)  # before any message: it fences the old ones off
    gc.collect(current)  # logs what fails, and keeps no worker from its work
    image_audit.at_start(current)
    readable = foreign().put_back()
    if readable:
        log.info("%d messages that another release could not read go back to their queues", readable)
    returned = take_back_messages()
    log.info("%d messages of the worker before are back in their queues", returned)
    keep_controls()
    workflow.app.steps["worker"].add(HostStep)
    workflow.app.steps["consumer"].add(TakeBack)
    # The worker is root on purpose: netns, CNI and runsc need it; only JSON is accepted.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    workflow.this_host()  # the probe runs here once, not in each child
    host_rootfs(current)  # and so does the look at the host's /etc
    stages.prune_rootfs(current)
    # Not by `worker_main`: Celery's command line brings prompt_toolkit, Flower and Tornado, 14 MB a worker.
    worker = workflow.app.Worker(
        hostname=f"{current.host}@{socket.gethostname()}",
        queues=["launch", f"host.{current.host}"],
        concurrency=current.slots,
        pool_cls="prefork",
        without_gossip=True,
        without_mingle=True,
        loglevel=current.log_level.upper(),
        quiet=True,
    )
    worker.start()
    sys.exit(worker.exitcode)


def keep_controls() -> None:
    """Leave of Celery's remote control what only looks; a worker logs the others as unknown."""
    for name in set(Panel.data) - CONTROLS:
        del Panel.data[name]


def take_back_messages() -> int:
    """Put back what the last worker of this host had taken and not acknowledged; returns how many.

    They lie under keys of this host alone (`unacked_key`), and the host lock says that no worker
    runs: nobody works on them. Without this they would wait for the visibility timeout.
    """
    with workflow.app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client:
            # Not HKEYS of the hash: kombu's client leaves that command without its key prefix.
            tags = client.zrange(channel.unacked_index_key, 0, -1)
        for tag in tags:
            channel.qos.restore_by_tag(tag, leftmost=False)
        return len(tags)


@before_task_publish.connect
def _before_publish(sender: str, **_: Any) -> None:
    faults.point(f"message.{sender.removeprefix('sandbatch.')}.publish.before")


@after_task_publish.connect
def _after_publish(sender: str, **_: Any) -> None:
    faults.point(f"message.{sender.removeprefix('sandbatch.')}.publish.after")


@task_prerun.connect
def _before_run(task: Any, **_: Any) -> None:
    faults.point(f"message.{task.name.removeprefix('sandbatch.')}.run.before")


@task_postrun.connect
def _after_run(task: Any, **_: Any) -> None:
    faults.point(f"message.{task.name.removeprefix('sandbatch.')}.run.after")


@worker_before_create_process.connect
def share_memory(**_: Any) -> None:
    """Let the pool's processes share what is loaded: a collection writes to every object that it looks at."""
    if not garbage.get_freeze_count():
        garbage.collect()
        garbage.freeze()


@worker_process_init.connect
def die_with_the_worker(**_: Any) -> None:
    """A pool process must not go on for a killed worker: the next one decides what is due."""
    die_with_parent(_worker_pid)


def die_with_parent(parent: int) -> None:
    """Be killed when process `parent`, which started this one, dies, however it dies."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(prctl_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
