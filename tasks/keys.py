"""Names of what Redis keeps for sandbatch, and how long it does."""

PREFIX = "sandbatch:"
EVENTS = PREFIX + "events"
SANDBOXES = PREFIX + "sandboxes"  # sorted set: id by time of creation
DEADLINES = PREFIX + "deadlines"  # sorted set: id by its deadline, of what may still be queued
OLD_QUEUED = PREFIX + "queued"  # sorted set: id by time, of what a client of release 0.1.0 has enqueued
UNCOUNTED = PREFIX + "uncounted"  # set: ids that scripts of release 0.1.0 move, which count for no batch
LINES = PREFIX + "lines"  # set: the names of the lines that are not empty, and of some that are
BELL = PREFIX + "bell"  # stream: something waits to be taken; bell:HOST: look again, you may have room
BATCHES = PREFIX + "batches"  # sorted set: batch by time
OPEN = PREFIX + "open"  # sorted set: batch whose submission is under way, by time
BROKEN_BATCHES = PREFIX + "broken"  # set: batches to be cancelled by their own rule
DRAINS = PREFIX + "drains"  # hash: host -> the wish that it takes no work
HOSTS = PREFIX + "hosts"
LAST_HOSTS = PREFIX + "hosts:last"  # hash: host -> what it said last; "left" once it has stopped cleanly
EPOCH = PREFIX + "epoch"  # whoever finds none makes one: it goes with the broker's data
SWEEPER = PREFIX + "sweeper:2"  # of its own: the sweep of release 0.1.0 does not do what this one does
CHUNK = 1000  # commands in one pipeline, ids in one script: the broker does nothing else for milliseconds
BELLS_KEPT = 100
EVENTS_KEPT = 100_000
TERMINAL_KEPT_S = 24 * 3600  # a record of an ended sandbox
TAKEN_KEPT_S = 400 * 24 * 3600  # who launches a signed spec, where it may be launched elsewhere later
PULLS_KEPT_S = 30  # what a host pulls, after its last word of it


def sandbox_key(container_id: str) -> str:
    return f"{PREFIX}sb:{container_id}"


def sealed_key(container_id: str) -> str:
    """What of a sandbox's spec clients may write and not read: see `tasks.sealed`."""
    return f"{PREFIX}sealed:{container_id}"


def taken_key(signed_as: str) -> str:
    """Who launches a signed spec: see `tasks.claims`. Clients have no access to it."""
    return f"{PREFIX}taken:{signed_as}"


def line_key(name: str) -> str:
    """A line of those that wait, in their order; its name is what each of them needs."""
    return f"{PREFIX}line:{name}"


def batch_key(name: str) -> str:
    return f"{PREFIX}batch:{name}"


def host_key(host: str) -> str:
    return f"{PREFIX}host:{host}"
