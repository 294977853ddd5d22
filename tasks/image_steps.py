"""The Celery tasks of stage `image`, whose pull holds no launch slot and no process.

image ┄ not here ┄▶ fetcher ┄▶ fetched ─▶ a line in the record ┄ puller, for a slot ┄▶ image ─▶ netns
"""

import logging
from typing import Any

import redis
from celery import Task
from celery.exceptions import Ignore, Reject

from tasks.app import settings
from tasks.messages import Order, read_order, read_pull_order
from tasks.workflow import again, app, journal_of, launch_chain, record, report, skip, this_host
from worker import fetcher
from worker import journal as journals
from worker.errors import Busy, ImageError, JournalError, SandbatchError
from worker.image_ref import parse_image
from worker.image_store import ImageStore
from worker.journal import Journal
from worker.launch import begin_pull, end_pull, refuse_image, use_image

log = logging.getLogger("sandbatch")

ADMITTED_S = 10.0  # the message of a launch that goes on is on its way for so long


@app.task(name="sandbatch.image", bind=True, max_retries=None)
def image(self: "Task[Any, Any]", message: dict[str, Any], is_admitted: bool = False) -> None:
    """Do stage image if the image is here; else the fetcher gets it, and the launch goes on after that.

    It then begins anew with this stage, `is_admitted`, once the host's puller has a slot for it.
    """
    order = read_order(message)
    try:
        with journal_of(order) as journal:
            if journal.is_unwinding:
                raise Ignore
            is_waiting = journal.waits_for_image and not journal.is_stale
            if journal.is_done("image") and not journal.is_stale:
                skip(journal, "image")
            elif not is_waiting or is_admitted:  # else a twin: what waits, waits
                is_waiting = not _have_image(journal)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Reject(error, requeue=True) from error
    except SandbatchError as error:
        raise again(self, order, error) from error
    report(journal)
    if is_waiting:
        fetcher.hand_over(settings(), order.container_id)
        raise Ignore


def _have_image(journal: Journal) -> bool:
    """Use the image; False if it is to be fetched, as the journal says."""
    store, asked = ImageStore(settings()), journal.asked
    digest = _digest_for(journal, store)
    is_here = digest is not None and store.find(digest) is not None
    if is_here and digest is not None:
        try:
            use_image(this_host(), journal, digest)
            return True
        except ImageError:
            if store.find(digest) is not None:
                raise  # else it was removed between the look and the use
    if asked.pull == "never":
        todo = f"pull it first: sandbatch pull {asked.image} --host {settings().host}"
        error = ImageError(f"image {asked.image}", "is not on this host, and is never to be pulled", todo)
        refuse_image(this_host(), journal, error)
        raise error
    begin_pull(this_host(), journal, digest, is_gone=is_here or bool(journal.facts.get("fetched")))
    return False


def _digest_for(journal: Journal, store: ImageStore) -> str | None:
    """The digest that a sandbox is to run; None if the reference is still to be resolved.

    A sandbox keeps its digest, and its batch has one for all. The first host of a batch may take what it
    has, unless the registry is always to be asked.
    """
    asked = journal.asked
    if journal.facts.get("image_digest"):
        return str(journal.facts["image_digest"])
    ref = parse_image(str(asked.image))
    if ref.digest:
        return ref.digest
    digest = record().pinned(journal.batch, str(ref))
    if digest is None and asked.pull != "always":
        found = store.lookup(ref)
        digest = record().pin(journal.batch, str(ref), found) if found else None
    return digest


@app.task(name="sandbatch.fetched", bind=True, max_retries=None)
def fetched(self: "Task[Any, Any]", message: dict[str, Any], outcome: str, detail: str, digest: str) -> None:
    """Note how a pull ended: the launch goes on once the puller has a slot for it, or has failed."""
    order = read_order(message)
    try:
        with journal_of(order) as journal:
            if not end_pull(journal, outcome, detail, digest):
                raise Ignore
    except Busy as error:
        raise again(self, order, error) from error
    if report(journal):
        admit([order.container_id])


def admit(ids: list[str]) -> None:
    """Line up launches whose image is here; reconcile does it again for what the broker has not heard."""
    try:
        record().admit(settings().host, ids, ADMITTED_S)
    except (redis.RedisError, OSError) as error:
        log.warning("launches wait, their images are here: %s", error)


def go_on(container_id: str, attempt: int) -> None:
    """Publish the stages of a launch that has waited for its image, and has a slot now."""
    try:
        known = journals.read(settings().sandboxes_dir / container_id)
    except JournalError:
        return  # it has ended meanwhile, which frees its slot
    if known.attempt == attempt and known.waits_for_image:
        order = Order(container_id=container_id, attempt=attempt)
        launch_chain(order, known.spec, is_admitted=True).apply_async()


@app.task(name="sandbatch.pull", read=staticmethod(read_pull_order))
def pull(message: dict[str, Any]) -> None:
    """Have the fetcher look at an order of `sandbatch pull`; what it asks for is in the record."""
    fetcher.hand_over(settings(), read_pull_order(message).pull_id)
