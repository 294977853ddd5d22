"""Looks now and then whether our rules are still loaded: a firewall's reload flushes every table.

A full comparison lists everything (2 to 3 s of CPU with a thousand policies), so it is made only when
there is a reason: the first look of a worker, or another table where ours was, as its handle says.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress

from worker import egress, egress_audit, journal, loopback, nft
from worker.errors import Busy, JournalError
from worker.journal import Journal
from worker.settings import Settings

log = logging.getLogger("sandbatch")


class Guard:
    """Brings back what was taken away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._handles: dict[str, int] | None = None  # of the last look at which all was well

    def look(self, journals: Iterable[Journal]) -> list[str]:
        """Load again what sandboxes that are up have lost; returns their ids.

        Raises:
            SandbatchError: nft's words; the next look tries again.
        """
        if nft.is_here() and loopback.is_open(self._settings):
            log.warning("published ports leave the host's loopback open to sandboxes: its rule is not there")
            loopback.close()
        due = [known for known in journals if known.is_up and known.is_done("egress")]
        if not due or not nft.is_here():
            self._handles = None
            return []
        handles = nft.table_handles()
        if handles == self._handles:
            return []
        lost = egress_audit.missing(due, nft.held())
        for container_id, why in lost.items():
            whom = {"sandbox": container_id, "stage": "egress"}
            log.warning("its policy is not there: %s", why, extra=whom)
            with (
                suppress(Busy, JournalError),  # it ends just now
                journal.locked(self._settings.sandboxes_dir, container_id) as known,
            ):
                if known.is_up and known.is_done("egress"):
                    egress.load(known)
        self._handles = None if lost else handles  # after a load: look once more
        return sorted(lost)
