"""What a wait says when a host falls silent, or a sandbox is launched elsewhere meanwhile."""

import time
from collections.abc import Iterable

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
        self._doubtful: set[str] = set()  # ids that a lost host has, or had at the last look
        self._due_s = 0.0

    def begin(self, ids: Iterable[str]) -> dict[str, str]:
        """The states of what is to be waited for."""
        states: dict[str, str] = {}
        self._read(states, list(ids))
        self.look(states)
        return states

    def look(self, states: dict[str, str]) -> bool:
        """Bring `states` up to what the hosts' silence and return mean; True if that changed them."""
        has_ended = any(states.get(one) in TERMINAL for one in self._doubtful)  # perhaps it was replaced
        if time.monotonic() < self._due_s and not has_ended:
            return False
        self._due_s = time.monotonic() + LOOK_S
        hosts = self._record.all_hosts()
        lost = {name: one["heartbeat_at"] for name, one in hosts.items() if one["state"] == LOST}
        before, self._lost = self._lost, lost
        old = dict(states)
        wanted = self._doubtful & set(states)
        if lost != before:
            wanted |= {one for one, state in states.items() if state not in TERMINAL}
        rows = self._read(states, sorted(wanted))
        for name in sorted(set(lost) - set(before)):
            count = sum(row["host"] == name and row["id"] in states for row in rows)
            if count:
                words = "1 sandbox" if count == 1 else f"{count} sandboxes"
                say(f"host {name} is lost since {moment(lost[name])}: {words} waited for, until it returns")
        return states != old

    def _read(self, states: dict[str, str], ids: list[str]) -> list[light.Row]:
        rows = light.read(self._record, ids)
        for row in rows:
            states[row["id"]] = row["state"]
            self._doubtful.discard(row["id"])
            if row["replaced_by"] and self._follows:
                successor = row["replaced_by"]
                say(f"{row['id']}: host {row['host']} was lost; {successor} is launched in its place")
                del states[row["id"]]
                self._read(states, [successor])
            elif row["state"] == UNKNOWN:
                self._doubtful.add(row["id"])
        return rows
