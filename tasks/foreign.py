"""Messages that this release cannot read are put aside whole, and back once the host is upgraded.

Celery throws away what has an unknown name or format, and fails what a task cannot read. Hosts are upgraded
one by one: such a message is of a newer release, and the host will be able to read it soon. It is moved, in
one step, from what the host has taken and not acknowledged to a list of its own (`foreign:HOST`); the worker
of another release moves it back when it starts. The worker of this release leaves it there: nothing loops.
"""

import inspect
import json
import logging
import time
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import redis
from celery import Task
from celery.exceptions import Ignore, Reject
from celery.worker.consumer import Consumer

from tasks.app import settings, transport_options
from tasks.connection import connect
from tasks.keys import PREFIX
from tasks.messages import RELEASE, read_order, read_words
from worker.errors import BadInput
from worker.journal import now

if TYPE_CHECKING:  # at run time it is no generic
    AnyTask = Task[Any, Any]
else:
    AnyTask = Task

log = logging.getLogger("sandbatch")
KEPT = 10_000  # messages a host; beyond it the oldest is lost, and the log says which

# KEYS: unacknowledged messages of the host, their index, the list.
# ARGV: delivery tag, most to keep, entry as JSON, into which the message goes as it is.
# Answers: how many are aside now, and the entry that is lost for it; 0 if the tag is not there (any more).
SET_ASIDE = """
local message = redis.call('HGET', KEYS[1], ARGV[1])
if not message then return {0} end
local entry = cjson.decode(ARGV[3])
entry['message'] = message
local count = redis.call('RPUSH', KEYS[3], cjson.encode(entry))
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if count <= tonumber(ARGV[2]) then return {count} end
return {count - 1, redis.call('LPOP', KEYS[3])}
"""

# KEYS: as above.  ARGV: this release, now (s).
# What another release has put aside is again what the host has taken and not acknowledged. Answers: how many.
PUT_BACK = """
local entries = redis.call('LRANGE', KEYS[3], 0, -1)
local count = 0
redis.call('DEL', KEYS[3])
for _, text in ipairs(entries) do
  local entry = cjson.decode(text)
  if entry['release'] == ARGV[1] then
    redis.call('RPUSH', KEYS[3], text)
  else
    redis.call('HSET', KEYS[1], entry['tag'], entry['message'])
    redis.call('ZADD', KEYS[2], ARGV[2], entry['tag'])
    count = count + 1
  end
end
return count
"""


class Foreign:
    """The messages that one host has put aside, behind one connection."""

    def __init__(self, client: "redis.Redis", host: str) -> None:
        self.client = client
        self._host = host
        options = transport_options(host)
        prefix = str(options["global_keyprefix"])
        self._list = f"{PREFIX}foreign:{host}"
        self._keys = [prefix + options["unacked_key"], prefix + options["unacked_index_key"], self._list]
        self._set_aside = client.register_script(SET_ASIDE)
        self._put_back = client.register_script(PUT_BACK)

    def set_aside(self, tag: str, task: str, why: str) -> None:
        """Keep a message that the host has taken, and tell; it needs no acknowledgement any more."""
        entry = {"tag": tag, "task": task, "why": why, "release": RELEASE, "at": now()}
        count, *lost = self._set_aside(keys=self._keys, args=[tag, KEPT, json.dumps(entry)])
        if count:
            log.error(
                "message %s is not for release %s: %s. It is kept aside, one of %d, until this host (%s) is "
                "upgraded: then its worker puts it back into its queue",
                *(task, RELEASE, why, count, self._host),
            )
        for text in lost:
            entry = json.loads(text)
            log.error("%d messages are aside: the oldest is lost, %s: %s", KEPT, entry["task"], entry["why"])

    def put_back(self) -> int:
        """Make what another release has put aside taken and not acknowledged; only while no worker runs."""
        return int(self._put_back(keys=self._keys, args=[RELEASE, time.time()]))

    def count(self) -> int:
        return int(self.client.llen(self._list))


@lru_cache(maxsize=1)
def foreign() -> Foreign:
    """Those of this host."""
    return Foreign(connect(settings(), patient=True), settings().host)


class OrderTask(AnyTask):
    """A task that reads its message before it begins."""

    abstract = True
    read = staticmethod(read_order)  # what its message must be

    def before_start(self, task_id: str, args: Any, kwargs: dict[str, Any]) -> None:
        if not str(self.name).startswith("sandbatch."):
            return  # Celery's own
        why = self._unreadable(args, kwargs)
        if why:
            tag = (self.request.properties or {}).get("delivery_tag", "")
            try:
                foreign().set_aside(tag, str(self.name), why)
            except redis.RedisError as error:
                raise Reject(error, requeue=True) from error
            raise Ignore

    def _unreadable(self, args: Any, kwargs: dict[str, Any]) -> str:
        try:
            told = self._signature.bind(*args, **kwargs).arguments
            self.read(told.pop("message"))
            read_words(told)
        except TypeError as error:  # an argument that this release does not have, or misses
            return str(error)
        except BadInput as error:
            return error.why
        return ""

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.run)


class ForeignConsumer(Consumer):
    """Celery's consumer, but for what it would throw away."""

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._keep(message, "it names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._keep(message, "there is no such task")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._keep(message, str(exc))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._keep(message, str(exc))

    def _keep(self, message: Any, why: str) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        try:
            foreign().set_aside(message.delivery_tag, str(headers.get("task") or "without a name"), why[:400])
        except redis.RedisError as error:
            # Not acknowledged: it comes again with the next connection, or the next worker.
            log.warning("host %s: a message waits to be put aside: %s", settings().host, error)
            return
        consumer: Any = self  # the types do not know its errors
        message.ack_log_error(log, consumer.connection_errors)  # frees its place among those that are taken
