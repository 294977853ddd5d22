"""The Celery app and its settings; why each value is what it is stands in docs/celery.md."""

from functools import lru_cache
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from tasks import transport
from tasks.connection import tls
from tasks.envelope import Guard
from worker.settings import Settings, load_settings

LAUNCH_QUEUE = "launch"
# 0 is the highest on Redis. Undo before anything else; then the stages, the last one first, so that a
# launch under way is finished before another is begun; new work last.
PRIORITY = {
    "unwind": 0,
    "undo": 0,
    "ended": 0,
    "stop": 0,
    "ready": 1,
    "fetched": 1,
    "container": 2,
    "bundle": 3,
    "egress": 4,
    "network": 5,
    "netns": 6,
    "image": 7,
    "restart": 8,
    "pull": 8,
    "place": 9,
}
VISIBILITY_TIMEOUT_S = 600  # > 5 x the hard limit; recovery comes from reconcile, not from this
SOFT_LIMIT_S, HARD_LIMIT_S = 90, 110  # above the deadlines of the subprocesses


def host_queue(host: str) -> str:
    return f"host.{host}"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()


def broker_url(current: Settings) -> str:
    url = current.broker_url or f"redis+socket://{current.broker_socket}"
    return url.replace("unix://", "redis+socket://", 1)


def transport_options(owner: str) -> dict[str, Any]:
    """Options of kombu's Redis transport; each owner's unacknowledged messages have keys of their own."""
    return {
        "global_keyprefix": "sandbatch:mq:",
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_key": f"unacked.{owner}",
        "unacked_index_key": f"unacked_index.{owner}",
        "unacked_mutex_key": f"unacked_mutex.{owner}",
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "priority_steps": list(range(10)),
        "queue_order_strategy": "priority",
        "socket_connect_timeout": 4,
        "socket_timeout": 30,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }


def make_app(current: Settings, owner: str) -> Celery:
    """A Celery app on the broker of the settings; `owner` is a host, or "client"."""
    transport.install()
    guard = Guard(current) if current.signing_key or current.trusted_keys else None
    is_host = owner != "client"
    task_cls = "tasks.foreign:OrderTask" if is_host else None
    app = Celery("sandbatch", broker=broker_url(current), set_as_current=False, task_cls=task_cls)
    app.conf.update(
        broker_transport_options={**transport_options(owner), "guard": guard},
        broker_use_ssl=tls(current) or None,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=4,
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,  # the journal owns what is tried again
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_track_started=False,
        task_soft_time_limit=SOFT_LIMIT_S,
        task_time_limit=HARD_LIMIT_S,
        task_create_missing_queues=True,
        task_default_queue=LAUNCH_QUEUE,
        task_send_sent_event=False,
        task_publish_retry=True,
        task_publish_retry_policy={
            "max_retries": 20,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 2,
        },
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,  # a third of the main process's work; Flower turns them on
        worker_hijack_root_logger=True,
        worker_disable_rate_limits=True,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        enable_utc=True,
    )
    if is_host:
        app.conf.worker_consumer = "tasks.foreign:ForeignConsumer"
        app.conf.task_queues = [_queue(LAUNCH_QUEUE), _queue(host_queue(current.host))]
    return app


def _queue(name: str) -> Queue:
    """An exchange of its own: Celery's default one would hand every message to every queue."""
    return Queue(name, Exchange(name, type="direct"), routing_key=name)


def options(step: str, host: str | None) -> dict[str, Any]:
    """Queue and priority of a step; the host's queue, or the shared one where `host` is None."""
    queue = host_queue(host) if host else LAUNCH_QUEUE
    return {"queue": queue, "priority": PRIORITY[step.partition(".")[0]]}
