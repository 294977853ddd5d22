"""The broker's users: what each may do there, and with which keys. For Redis 7 and later, and Valkey.

Found by running everything with an empty ACL LOG (`tests/host/test_acl.py`). Nobody has KEYS, SCAN, MONITOR,
CONFIG, DEBUG, FLUSHALL, nor what copies one key to another.
"""

import hashlib
from collections.abc import Iterable, Mapping

from tasks.keys import PREFIX

QUEUES = PREFIX + "mq:"  # `global_keyprefix` of `tasks.app.transport_options`
EVENT_CHANNELS = f"&{QUEUES}/0.celeryev/*"
CONTROL_CHANNEL = f"&{QUEUES}/0.celery.pidbox"

CONNECT = "ping hello auth select client|setname multi exec discard watch unwatch time"
SCRIPTS = "eval evalsha script|load script|exists"
# What the record is made of; the scripts of the record are checked call by call, too.
RECORD = (
    "get set exists del expire persist ttl hget hmget hgetall hset hsetnx hdel hincrby hvals hkeys hexists "
    "sadd srem smembers scard zadd zrem zrange zrangebyscore zscore zcard "
    "rpush lpop lrange llen lrem linsert xadd xread xrange xrevrange xtrim xdel"
)
# Taking work, and what kombu's consumers need. INFO says whether the broker was restarted.
WORK = "info zpopmin lpush brpop rpop lindex setex mget pexpire hlen zcount zrevrangebyscore sismember"
# What a consumer of events and replies needs.
WINDOW = (
    "exists del llen brpop lpush expire pexpire sadd srem smembers get set "
    "hget hset hdel zadd zrem zrange zcount zrangebyscore zrevrangebyscore"
)
LISTEN = "publish subscribe unsubscribe psubscribe punsubscribe"

# The keys of the record, which clients read and write. Not `foreign:`, `taken:`, `sweeper:`, `epoch` and the
# queues; and of hosts and batches all but these two, which no client may read, and none may write.
CLIENT_KEYS = (
    *("sb:*", "sandboxes", "events", "deadlines", "queued", "uncounted", "lines", "line:*", "bell", "bell:*"),
    *("batches", "open", "broken", "drains", "hosts", "hosts:last", "pull:*", "call:*"),
)
CALLS, PINS = ("host", ":calls"), ("batch", ":images")
CLIENT_READS = ("batch:*:images",)  # the digests that a batch runs
# Into these a client puts what only hosts may read: values of env, calls, messages.
CLIENT_WRITES = ("sealed:*", "host:*:calls", "mq:launch", "mq:launch?*", "mq:host.*")
# Whoever ends the last sandbox of a batch lets all of it expire.
CLIENT_MORE = (f"(~{PREFIX}batch:*:images +expire)",)
REPLIES = QUEUES + "*.reply.celery.pidbox*"
BINDINGS = QUEUES + "_kombu.binding*"


def _but(kind: str, end: str) -> list[str]:
    """Patterns of all keys of a kind but `KIND:NAME` + end: ACLs have no "but"."""
    ends = [end[number:] for number in range(len(end))]
    # The last is that of a NAME which is itself the word.
    return [*(f"{kind}*[^{one[0]}]{one[1:]}" for one in reversed(ends)), kind + end]


def _words(commands: str) -> list[str]:
    return [f"+{one}" for one in commands.split()]


def rules() -> dict[str, list[str]]:
    """For each user what it may do, as words of an ACL file."""
    client = [f"~{PREFIX}{one}" for one in (*CLIENT_KEYS, *_but(*CALLS), *_but(*PINS))]
    client += [f"%R~{PREFIX}{one}" for one in CLIENT_READS]
    client += [f"%W~{PREFIX}{one}" for one in CLIENT_WRITES]
    return {
        "cli": [*client, f"~{BINDINGS}", *_words(f"{CONNECT} {SCRIPTS} {RECORD} lpush"), *CLIENT_MORE],
        "worker": [
            *(f"~{PREFIX}*", EVENT_CHANNELS, CONTROL_CHANNEL),
            *_words(f"{CONNECT} {SCRIPTS} {RECORD} {WORK} {LISTEN}"),
        ],
        "flower": [
            *(f"~{one}" for one in (REPLIES, BINDINGS, f"{QUEUES}celeryev.*", f"{QUEUES}unacked*.client")),
            # Flower shows how long they are: that needs no reading, but some right.
            *(f"%R~{QUEUES}launch*", f"%R~{QUEUES}host.*", EVENT_CHANNELS, CONTROL_CHANNEL),
            *_words(f"{CONNECT} {SCRIPTS} {LISTEN} {WINDOW}"),
        ],
    }


USERS = tuple(rules())


def acl_file(passwords: Mapping[str, str]) -> str:
    """The broker's `aclfile`; it has the passwords' SHA-256 alone, and nobody but these users."""
    return "\n".join(["user default off", *_lines(passwords), ""])


def _lines(passwords: Mapping[str, str]) -> Iterable[str]:
    for name, may in rules().items():
        yield " ".join(("user", name, "on", f"#{digest(passwords[name])}", "resetchannels", *may))


def digest(password: str) -> str:
    """As the broker keeps it. Ours are 256 random bits: no plain digest of one is guessed back."""
    return hashlib.sha256(password.encode()).hexdigest()
