"""Hosts that are lost: what they had is launched elsewhere where that was asked for, or counted as failed.

A host is lost once it has been silent for `HOST_LOST_S`. Nothing of its records is touched for that: they are
shown as `unknown`, and when it returns its journals decide. What has been launched elsewhere meanwhile is
undone there by the host itself (`tasks.sweeper.sweep_host`).
"""

import json
import logging

from tasks.keys import CHUNK, sandbox_key
from tasks.record import Record
from tasks.state import State
from worker.spec import new_container_id

log = logging.getLogger("sandbatch")
MISSED_SWEEPS = 3  # in a row: after the broker was away all hosts look lost, until their next heartbeat


def sweep_lost(record: Record) -> None:
    """Launch elsewhere what asked for it on hosts that are lost; by one worker of the fleet at a time.

    Safe to repeat and to be cut short: one script makes the new record and notes it in the old one.
    """
    for host in record.missing_hosts(MISSED_SWEEPS):
        ids = record.ids_on(host)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            pipe = record.client.pipeline(transaction=False)
            for container_id in part:
                pipe.hmget(sandbox_key(container_id), ["reschedule", "replaced_by"])
            for container_id, (asks, successor) in zip(part, pipe.execute(), strict=True):
                if not asks or successor:
                    continue
                new_id = new_container_id()
                if record.reschedule(container_id, new_id, host):
                    words = "host %s is lost: launched anew as %s"
                    log.warning(words, host, new_id, extra={"sandbox": container_id})


def forget_host(record: Record, host: str) -> bool:
    """Forget a host for good, its sandboxes have failed; False if it lives.

    Should it come back, it undoes what it still has of them.
    """
    if record.is_live(host):
        return False
    for row in record.get_all(record.ids_on(host)):
        if row["replaced_by"]:
            record.put(row["id"], State.CANCELLED, row["attempt"], {"reason": "rescheduled"})
        else:
            error = {"stage": row["stage"] or "place", "message": f"host {host} was lost, and is forgotten"}
            record.put(
                row["id"], State.FAILED, row["attempt"], {"error": json.dumps(error), "reason": "lost"}
            )
    return record.drop_host(host)
