"""Hosts of release 0.1.0 beside this one: work for them, and what their scripts do not count.

Such a host waits for `place` on its queue, or on the shared queue `launch`; its script lets it have what is
its own in the record already. So a sweep takes for it what it has room for, by the same script by which the
other hosts take, and publishes `place` on its queue. It never gets what only younger hosts know (spec/v2).
"""

from collections.abc import Mapping
from typing import Any

from celery import Celery

from tasks.record import Record
from tasks.submit import publish_place
from worker.spec import KINDS

AT_ONCE = 4  # times its launch slots: it gets work at each sweep, not when a launch is through


def hand_out(app: Celery, record: Record) -> None:
    """Take work for hosts of release 0.1.0, and count what they have done; harmless to repeat."""
    record.count_moved()
    for host, facts in record.live_hosts().items():
        if not facts.get("pulls") and not facts.get("not_ready"):
            have = _offer(facts, len(record.ids_on(host)))
            # More than its share: the others were woken at once, and have had theirs.
            while taken := record.take(host, have):
                # Should this not be heard: its own sweep publishes again what has no journal.
                publish_place(app, [(container_id, attempt, host) for container_id, attempt in taken])


def _offer(facts: Mapping[str, Any], known: int) -> dict[str, Any]:
    """`known`: sandboxes that the record has there; a broker that lost its data has fewer than the host."""
    return {
        "capacity": facts["capacity"] - max(0, facts["sandboxes"] - known),
        "slots": facts["slots"] * AT_ONCE,
        "rooms": dict.fromkeys(facts["networks"], -1),
        "kinds": KINDS[:1],
        "elder": True,
    }
