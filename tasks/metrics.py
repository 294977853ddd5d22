"""The numbers of one host for Prometheus (docs/metrics.md): counts of what ended, and looks at what is there.

What is there is read from the journals at each scrape, so that it is right after a crash, and while the
broker is away. Labels are of a few fixed values, and `host`: no id, nothing that a user has chosen.
"""

import os
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import redis
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tasks import drains
from tasks.app import PRIORITY, host_queue, transport_options
from tasks.connection import connect
from tasks.messages import RELEASE
from tasks.puller import no_disk
from tasks.record import Record
from tasks.state import TERMINAL, State
from tasks.view import state_of
from worker import journal as journals
from worker import last_audit
from worker.errors import JournalError
from worker.outcomes import REASONS, RESULTS, STAGE_NAMES, VERBS
from worker.settings import MEMORY_PER_SANDBOX, Settings
from worker.spec import CONTAINER_ID

# Of a netns 2 ms are usual, of a container 150; a program has 30 s, a pull of an image 600.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STATES = tuple(
    state for state in State if state not in (State.QUEUED, State.PLACED)
)  # what a journal can say
ANSWER_KEPT_S = 1.0  # of the broker, so that several who scrape ask it once
UNREADABLE = "unreadable"


class Counts:
    """What has ended since this worker began: `worker.outcomes` tells it, from all its processes."""

    def __init__(self, registry: CollectorRegistry, host: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        words = "Stages and undos that ended; each try counts."
        self._stages = Counter(
            "sandbatch_stages", words, ("host", "stage", "verb", "result"), registry=registry
        )
        words = "How long stages and undos took."
        self._seconds = Histogram(
            *("sandbatch_stage_seconds", words, ("host", "stage", "verb", "result")),
            buckets=BUCKETS_S,
            registry=registry,
        )
        words = "From the moment a host took a sandbox until it was ready; without restarts of its program."
        launches = Histogram(
            "sandbatch_launch_seconds", words, ("host",), buckets=BUCKETS_S, registry=registry
        )
        words = "Sandboxes that ended, with everything undone; reason stage: a stage of its launch failed."
        self._ended = Counter("sandbatch_ended", words, ("host", "state", "reason"), registry=registry)
        self._host, self._launches = host, launches.labels(host)
        # All there from the start: of one that begins with 1 Prometheus sees no increase.
        for stage in STAGE_NAMES:
            for verb in VERBS:
                for result in RESULTS:
                    self._stages.labels(host, stage, verb, result)
        for state in TERMINAL:
            for reason in REASONS:
                self._ended.labels(host, state.value, reason)

    def stage(self, stage: str, verb: str, result: str, duration_s: float) -> None:
        self._stages.labels(self._host, stage, verb, result).inc()
        self._seconds.labels(self._host, stage, verb, result).observe(duration_s)

    def launched(self, duration_s: float) -> None:
        self._launches.observe(duration_s)

    def ended(self, state: str, reason: str) -> None:
        self._ended.labels(self._host, state, reason).inc()


@dataclass(frozen=True)
class Seen:
    """What a journal said when it was last written."""

    mark: tuple[int, int]
    state: str
    stuck: str | None = None
    holds_slot: bool = False
    memory_bytes: int = 0


class Sandboxes:
    """The journals of a host; one is read again only if it was written since."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._each = settings.default_memory or MEMORY_PER_SANDBOX
        self._seen: dict[str, Seen] = {}

    def look(self) -> list[Seen]:
        folder = self._settings.sandboxes_dir
        names = os.listdir(folder) if folder.is_dir() else []
        found = {name: self._look_at(name) for name in names if CONTAINER_ID.fullmatch(name)}
        self._seen = {name: seen for name, seen in found.items() if seen is not None}
        return list(self._seen.values())

    def _look_at(self, name: str) -> Seen | None:
        """None where there is none (any more)."""
        folder, known = self._settings.sandboxes_dir / name, self._seen.get(name)
        try:
            info = (folder / journals.FILE).lstat()
            mark = (info.st_mtime_ns, info.st_size)
            return known if known is not None and known.mark == mark else self._read(name, mark)
        except FileNotFoundError:
            return Seen((0, 0), UNREADABLE) if journals.set_aside_files(folder) else None
        except JournalError as error:
            return Seen((0, 0), UNREADABLE) if error.kind or folder.exists() else None
        except OSError:
            return Seen((0, 0), UNREADABLE)

    def _read(self, name: str, mark: tuple[int, int]) -> Seen:
        known = journals.read(self._settings.sandboxes_dir / name)
        state = state_of(known)
        stuck = known.facts.get("stuck") if state == State.STUCK else None
        is_waiting = known.waits_for_image or "ready" in known.begun
        return Seen(
            mark=mark,
            state=state.value,
            stuck=str(stuck["stage"]) if stuck else None,
            holds_slot=state == State.LAUNCHING and not is_waiting,
            memory_bytes=known.spec.memory_bytes or self._each,
        )


class Broker:
    """What the broker says at the moment, asked with short waits of its own."""

    def __init__(self, settings: Settings) -> None:
        self._client = connect(settings)
        self._record = Record(self._client)
        queue = host_queue(settings.host)
        prefix = str(transport_options(settings.host)["global_keyprefix"])
        # As kombu names the list of each priority (kombu/transport/redis.py, _q_for_pri).
        priorities = range(max(PRIORITY.values()) + 1)
        self._queues = [f"{prefix}{queue}" + (f"\x06\x16{number}" if number else "") for number in priorities]

    def ask(self) -> tuple[int, int] | None:
        """Sandboxes that wait in the fleet's lines, messages that wait for this host; None if it is away."""
        try:
            waiting = self._record.count_waiting()
            pipe = self._client.pipeline(transaction=False)
            for name in self._queues:
                pipe.llen(name)
            return waiting, sum(cast("list[int]", pipe.execute()))
        except (redis.RedisError, OSError):
            return None


class HostCollector(Collector):
    """What is there at the moment, on this host and in the broker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sandboxes = Sandboxes(settings)
        self._broker = Broker(settings)
        self._lock = threading.Lock()  # who scrapes at the same time gets the same look
        self._looked_s = float("-inf")
        self._found: list[Metric] = []

    def describe(self) -> list[Metric]:
        return []  # else the registry would look once to learn the names

    def collect(self) -> list[Metric]:
        with self._lock:
            if time.monotonic() - self._looked_s > ANSWER_KEPT_S:
                self._found = [*self._of_host(), *self._of_sandboxes(), *self._of_audit(), *self._of_broker()]
                self._looked_s = time.monotonic()
            return self._found

    def _of_host(self) -> Iterator[Metric]:
        current, gauge = self._settings, self._gauge
        info = GaugeMetricFamily("sandbatch_info", "Always 1.", labels=("host", "version"))
        info.add_metric((current.host, RELEASE), 1)
        yield info
        yield gauge("sandbatch_capacity", "Sandboxes that this host may have.", current.capacity)
        yield gauge("sandbatch_slots", "Launches that this host may have under way.", current.slots)
        yield gauge("sandbatch_memory_bytes", "Memory for all sandboxes together.", current.memory)

    def _of_sandboxes(self) -> Iterator[Metric]:
        seen, gauge = self._sandboxes.look(), self._gauge
        there = [one for one in seen if one.state != UNREADABLE]
        states = Tally(one.state for one in there)
        words = "Sandboxes that this host has, by state; those that ended have not been told to the broker."
        yield gauge(
            "sandbatch_sandboxes", words, {state.value: states[state.value] for state in STATES}, "state"
        )
        words = "Launches that hold a slot; who waits for an image or an answer holds none."
        yield gauge("sandbatch_slots_used", words, sum(one.holds_slot for one in there))
        words = "Memory that the sandboxes on this host count for."
        yield gauge("sandbatch_memory_asked_bytes", words, sum(one.memory_bytes for one in there))
        stuck = Tally(one.stuck for one in there if one.stuck)
        words = "Sandboxes with an undo that keeps failing, by its stage; the worker goes on trying."
        by_stage = {stage: stuck[stage] for stage in STAGE_NAMES if stage != "place"}
        yield gauge("sandbatch_stuck_undos", words, by_stage, "stage")
        words = "Sandboxes whose journal cannot be read; sandbatch audit names them."
        yield gauge("sandbatch_unreadable_journals", words, len(seen) - len(there))
        reasons = {
            "drained": drains.is_drained(self._settings),
            "full": len(seen) >= self._settings.capacity,
            "disk": bool(no_disk(self._settings)),
        }
        words = "1 for each reason why this host takes no new sandboxes; sandbatch hosts has the words."
        yield gauge("sandbatch_not_taking", words, reasons, "reason")

    def _of_audit(self) -> Iterator[Metric]:
        found = last_audit.last(self._settings)
        if found is None:
            return
        words = "When sandbatch audit last looked at this host."
        yield self._gauge("sandbatch_audit_timestamp_seconds", words, found.at_s)
        words = "Objects that the last audit found left over, missing or changed."
        yield self._gauge("sandbatch_audit_leaks", words, found.found)
        yield self._gauge("sandbatch_audit_leaks_by_kind", words, found.kinds, "kind")

    def _of_broker(self) -> Iterator[Metric]:
        answer = self._broker.ask()
        yield self._gauge("sandbatch_broker_up", "1 if the broker answered just now.", answer is not None)
        if answer is not None:
            words = "Sandboxes of the whole fleet that wait for a host with room: each host says the same."
            yield self._gauge("sandbatch_queue_length", words, answer[0])
            words = "Messages that wait for this host's pool: stages, undos, ends."
            yield self._gauge("sandbatch_host_messages", words, answer[1])

    def _gauge(self, name: str, words: str, value: float | Mapping[str, int], label: str = "") -> Metric:
        gauge = GaugeMetricFamily(name, words, labels=("host", label) if label else ("host",))
        for key, one in value.items() if isinstance(value, Mapping) else [("", value)]:
            gauge.add_metric((self._settings.host, key) if label else (self._settings.host,), float(one))
        return gauge


def make_registry(settings: Settings, listen: Callable[[Counts], None]) -> CollectorRegistry:
    """All numbers of this host; `listen` has its outcomes counted from now on."""
    registry = CollectorRegistry()
    listen(Counts(registry, settings.host))
    registry.register(HostCollector(settings))
    return registry
