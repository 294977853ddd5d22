"""What Celery's tasks log: each line says of which sandbox, and a task that fails one line, why.

The stages themselves log in `worker.launch`. Celery's own lines of tasks are left out: `worker.log_lines`.
"""

import logging
from typing import Any

from celery.apps import worker as celery_worker
from celery.signals import setup_logging, task_failure, task_postrun, task_prerun

from tasks.app import broker_url
from worker import log_lines, secrets
from worker.settings import Settings
from worker.spec import CONTAINER_ID

log = logging.getLogger("sandbatch")


def set_up(settings: Settings) -> None:
    """Log as the settings say, here and in the processes of the pool."""
    secrets.know_url(broker_url(settings))
    log_lines.set_up(settings)
    # What it says of a signal would go past our format, to stdout.
    celery_worker.safe_say = _said  # type: ignore[attr-defined]  # the stubs do not have it


def _said(words: str, *_: Any) -> None:
    log.info("%s", words.strip())


@setup_logging.connect
def _is_set_up(**_: Any) -> None:
    """Celery sets up nothing itself where somebody listens."""


@task_prerun.connect
def _begin(task: Any, kwargs: Any, **_: Any) -> None:
    log_lines.now_about(**_fields(str(task.name), kwargs))


@task_postrun.connect
def _end(**_: Any) -> None:
    log_lines.now_about()


@task_failure.connect
def _failed(sender: Any, exception: BaseException, kwargs: Any, traceback: Any, **_: Any) -> None:
    """In the pool's process; for one that was lost, or killed by its time limit, in the worker's."""
    name = str(sender.name)
    verb = "undo failed" if name.startswith("sandbatch.undo.") else "failed"
    detail = (type(exception), exception, traceback if hasattr(traceback, "tb_frame") else None)
    with log_lines.about(**_fields(name, kwargs)):
        if log_lines.is_defect(exception):
            log.error("%s by a defect: %s", verb, log_lines.words_of(exception), exc_info=detail)
        else:
            log.error("%s: %s", verb, log_lines.words_of(exception))


def _fields(name: str, kwargs: Any) -> dict[str, Any]:
    """Of a message that anybody with the broker's password can write: what is no id is left out."""
    message = kwargs.get("message") if isinstance(kwargs, dict) else None
    message = message if isinstance(message, dict) else {}
    container_id, attempt = message.get("container_id"), message.get("attempt")
    is_known = isinstance(container_id, str) and CONTAINER_ID.fullmatch(container_id)
    return {
        "stage": name.removeprefix("sandbatch.").removeprefix("undo."),
        **({"sandbox": container_id} if is_known else {}),
        **({"attempt": attempt} if isinstance(attempt, int) else {}),
    }
