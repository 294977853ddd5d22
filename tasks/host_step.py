"""What a worker's main process does beside its tasks: heartbeat, keeper, reconcile. A Celery bootstep."""

import logging
import os
import secrets
import signal
import threading
import time
from typing import Any

import redis
from celery import bootsteps
from kombu.exceptions import KombuError

from tasks import drains, image_steps, workflow
from tasks.app import settings
from tasks.connection import connect
from tasks.foreign import foreign
from tasks.host_calls import make_service
from tasks.host_facts import host_facts
from tasks.host_record import HEARTBEAT_S
from tasks.messages import Order
from tasks.pull_messages import PullMessages
from tasks.puller import Puller
from tasks.record import Record
from tasks.room import offer
from tasks.sweeper import sweep_fleet, sweep_host
from worker import journal as journals
from worker import logs, reconcile
from worker.egress_guard import Guard
from worker.errors import SandbatchError
from worker.fetcher import Fetcher
from worker.keeper import Keeper
from worker.launch import begin_waiting
from worker.settings import Settings

log = logging.getLogger("sandbatch")


class HostStep(bootsteps.StartStopStep):
    """Everything that the main process of a worker does for its host, in a thread and the keeper's loop."""

    requires = ("celery.worker.components:Pool",)
    due_at_start: reconcile.Due | None = None  # found before the worker took any message

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = threading.Event()

    def start(self, parent: Any) -> None:
        self._settings = settings()
        self._record = Record(connect(self._settings, patient=True))
        self._owner = host_owner(self._settings)
        self._broker_life = self._told_life = ""
        self._later = reconcile.Later(self._settings)
        self._guard = Guard(self._settings)
        puller_record = Record(connect(self._settings, patient=True))  # it blocks on this connection

        def have() -> dict[str, Any]:
            # The broker may have lost it since the last heartbeat.
            drains.settle(puller_record, self._settings)
            return {**offer(self._settings), "owner": self._owner, "life": self._told_life}

        self._puller = Puller(workflow.app, puller_record, self._settings, have, image_steps.go_on)
        self._pull_messages = PullMessages(self._settings, Record(connect(self._settings, patient=True)))
        self._fetcher = Fetcher(self._settings, self._pull_messages)
        self._fetcher.start()
        self._keeper = Keeper(self._settings, workflow.this_host(), Messages())
        self._keeper.start()
        self._calls = make_service(self._settings)
        self._calls.start()
        self._thread = threading.Thread(target=self._live, name="host", daemon=True)
        self._thread.start()

    def stop(self, parent: Any) -> None:
        self._stop.set()
        self._puller.stop()
        self._calls.stop()
        self._thread.join(timeout=5)
        self._keeper.stop()
        self._fetcher.stop()
        self._pull_messages.forget()
        try:
            self._record.leave(self._settings.host)
        except redis.RedisError as error:
            log.warning("host %s cannot say that it leaves: %s", self._settings.host, error)

    def _live(self) -> None:
        """Heartbeat every 5 s; what is left over, at once and every `reconcile_s`."""
        due_s = 0.0
        while not self._stop.is_set():
            try:
                if self._beat() or due_s <= 0 or self._told_life != self._broker_life:
                    self._reconcile()
                    due_s = self._settings.reconcile_s
                    self._tell_all()
                    self._puller.start()  # what the worker before has left comes first
            except (redis.RedisError, KombuError, OSError, SandbatchError) as error:
                log.warning("host %s: its look at what is due is put off: %s", self._settings.host, error)
                due_s = 0.0
            except Exception:  # a defect must not end the looks that keep the promise
                log.exception("host %s: a look at its journals failed", self._settings.host)
            pause_s = min(HEARTBEAT_S, self._settings.reconcile_s)
            due_s -= pause_s
            self._stop.wait(pause_s)

    def _beat(self) -> bool:
        """Say that this host lives; True if it was taken for lost until now, and must look at once."""
        host = self._settings.host
        if not self._record.take_name(host, self._owner):
            log.error("host %s: another machine has taken this name; stopping. Give this one another", host)
            os.kill(os.getpid(), signal.SIGTERM)
            self._stop.set()
            return False
        was_lost = not self._record.is_live(host)
        drain = drains.settle(self._record, self._settings)
        facts = {**host_facts(self._settings), "drained": drain if drain and drain["drained"] else None}
        facts["foreign"] = foreign().count()
        life = self._record.heartbeat(host, facts)
        if life != self._broker_life:
            self._later.forget_reports()  # it may have lost what it knew
            self._broker_life = life
        return was_lost

    def _tell_all(self) -> None:
        """Have a broker that may have lost what it knew know each sandbox here; then take more."""
        life = self._broker_life
        if self._told_life == life:
            return
        for known in journals.read_all(self._settings.sandboxes_dir)[0]:
            if not workflow.report(known):
                return
        self._told_life = life
        self._record.ring(self._settings.host)

    def _reconcile(self) -> None:
        logs.prune(self._settings, time.time())
        is_first = self.due_at_start is not None
        self._carry_out(self.due_at_start or self._later.look())
        host, sandboxes = self._settings.host, self._settings.sandboxes_dir
        if is_first:
            self._record.count_memory(host, offer(self._settings)["each"])
        sweep_host(workflow.app, self._record, host, sandboxes, is_first=is_first)
        sweep_fleet(workflow.app, self._record)
        type(self).due_at_start = None  # only now: without a broker it is still due
        self._guard.look(self._later.up)

    def _carry_out(self, due: reconcile.Due) -> None:
        for known in due.relaunch:
            workflow.relaunch(known)
        for known in due.unwind:
            workflow.step("unwind", _order(known), final=str(known.facts["wanted"])).apply_async()
        for known in due.wait:
            if "ready" not in known.begun:
                with journals.locked(self._settings.sandboxes_dir, known.container_id, wait_s=1) as mine:
                    begin_waiting(mine)
        for known in due.ended:
            Messages().ended(known.container_id, known.attempt)
        for known in due.restart:
            Messages().restart(known.container_id, known.attempt)
        for known in [*due.wait, *due.watch, *due.relaunch, *due.fetch, *due.admit]:
            self._keeper.watch(known.container_id)
        for known in due.fetch:
            self._fetcher.look(known.container_id)
        for known in [*due.report, *due.relaunch, *due.wait, *due.fetch, *due.admit]:
            if workflow.report(known):
                self._later.settle(known.container_id)
                if known.final:
                    workflow.forget(known)
        if due.admit:
            image_steps.admit([known.container_id for known in due.admit])
        self._fetcher.look_again()
        for order in self._record.orders_on(self._settings.host):
            self._fetcher.look(order["id"])


class Messages:
    """What the keeper tells, as tasks on this host's queue (`worker.keeper.Tell`)."""

    def ready(self, container_id: str, attempt: int, outcome: str, detail: str) -> None:
        order = Order(container_id=container_id, attempt=attempt)
        signature = workflow.step("ready", order, outcome=outcome, detail=detail)
        # With the errback of a launch: a sandbox that does not answer has failed.
        signature.on_error(workflow.step("unwind", order, final="failed")).apply_async()

    def ended(self, container_id: str, attempt: int) -> None:
        workflow.step("ended", Order(container_id=container_id, attempt=attempt)).apply_async()

    def restart(self, container_id: str, attempt: int) -> None:
        workflow.step("restart", Order(container_id=container_id, attempt=attempt)).apply_async()

    def stop(self, container_id: str, attempt: int, reason: str) -> None:
        order = Order(container_id=container_id, attempt=attempt)
        workflow.step("stop", order, reason=reason).apply_async()


def host_owner(current: Settings) -> str:
    """What tells this host's folders from those of another machine with the same name."""
    path = current.state_dir / "host-id"
    try:
        return path.read_text()
    except FileNotFoundError:
        owner = secrets.token_hex(8)
        writing = path.with_name(f".host-id.{owner}")
        writing.write_text(owner)
        writing.rename(path)
        return owner


def _order(known: journals.Journal) -> Order:
    return Order(container_id=known.container_id, attempt=known.attempt)
