"""What a wait says when a host falls silent, or a sandbox is launched elsewhere meanwhile."""

import time

from cli.output import say
from tasks import rows as light
from tasks.host_record import LOST
from tasks.record import Record
from tasks.room import moment
from tasks.state import TERMINAL, UNKNOWN

LOOK_S = 5.0  # silence rings no bell


class Away:
    """Looks now and then after the hosts of what is waited for.

    `follows`: a sandbox that was launched elsewhere is waited for in place of the one that it replaces.
    """

    def __init__(self, record: Record, *, follows: bool) -> None:
        self._record = record
        self._follows = follows
        self._lost: dict[str, str] = {}  # host -> its last heartbeat
        self._due_s = 0.0

    def look(self, states: dict[str, str]) -> bool:
        """Bring `states` up to what the hosts' silence and return mean; True if that changed them."""
        if time.monotonic() < self._due_s:
            return False
        self._due_s = time.monotonic() + LOOK_S
        hosts = self._record.all_hosts()
        lost = {name: one["heartbeat_at"] for name, one in hosts.items() if one["state"] == LOST}
        before, self._lost = self._lost, lost
        old = dict(states)
        if lost != before:
            rows = light.read(self._record, [one for one, state in states.items() if state not in TERMINAL])
        else:
            rows = light.read(self._record, [one for one, state in states.items() if state == UNKNOWN])
        for row in rows:
            states[row["id"]] = row["state"]
            if row["replaced_by"] and self._follows:
                self._follow(states, row)
        for name in sorted(set(lost) - set(before)):
            count = sum(row["host"] == name and row["id"] in states for row in rows)
            if count:
                words = "1 sandbox" if count == 1 else f"{count} sandboxes"
                say(f"host {name} is lost since {moment(lost[name])}: {words} waited for, until it returns")
        return states != old

    def _follow(self, states: dict[str, str], row: light.Row) -> None:
        say(f"{row['id']}: host {row['host']} was lost; {row['replaced_by']} is launched in its place")
        del states[row["id"]]
        (successor,) = light.read(self._record, [row["replaced_by"]]) or [{"state": UNKNOWN}]
        states[row["replaced_by"]] = successor["state"]
