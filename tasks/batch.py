"""A batch: sandboxes that were submitted together, and the rule by which they go and are judged."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from worker.errors import BadInput

NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,62}$")
SUCCESS = re.compile(r"^(?:all|(?P<number>[0-9]{1,7})|(?P<percent>[0-9]{1,3})%)$")
COUNTERS = ("total", "released", "up", "ended", "good", "bad")


@dataclass(frozen=True)
class BatchPlan:
    """How a batch goes; the defaults are those of `run`.

    `success`: "all", "N" or "N%" of them are to succeed; "": no rule. A sandbox has succeeded if its program
    ended with 0, or was ended by stop, rm or its ttl.
    `max_in_flight`: as many at a time, from their release to their end.
    `waves`: sizes; the next wave is released once all before it are up, running or ended; the last repeats.
    `fail_fast`: once the rule cannot be met any more, the rest is cancelled.
    """

    success: str = ""
    max_in_flight: int | None = None
    waves: tuple[int, ...] = ()
    fail_fast: bool = False
    deadline_at: str | None = None  # its specs have it too; this is to be shown

    def __post_init__(self) -> None:
        match = SUCCESS.fullmatch(self.success) if self.success else None
        if self.success and (match is None or int(match["percent"] or 0) > 100):
            raise BadInput(f"success {self.success!r}", "all, N or N% is needed", "for example 90%")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise BadInput(
                f"max_in_flight {self.max_in_flight}", "at least 1 is needed", "leave it out for no limit"
            )
        if any(wave < 1 for wave in self.waves):
            raise BadInput(f"waves {list(self.waves)}", "each wave has at least 1", "for example 1,10,100")

    def needed(self, total: int) -> int | None:
        """Successes that the rule asks for; None without a rule.

        Raises:
            BadInput: More than there are.
        """
        match = SUCCESS.fullmatch(self.success)
        if match is None:
            return None
        number = total if self.success == "all" else int(match["number"] or 0)
        if match["percent"]:
            number = math.ceil(total * int(match["percent"]) / 100)
        if number > total:
            raise BadInput(f"success {self.success}", f"there are {total} sandboxes", "ask for fewer")
        return number

    @property
    def holds_back(self) -> bool:
        return self.max_in_flight is not None or bool(self.waves)

    def first(self, total: int) -> int:
        """How many go at once."""
        return min(total, self.max_in_flight or total, self.waves[0] if self.waves else total)

    def fields(self, total: int) -> dict[str, str | int]:
        """The part of the batch's hash that the scripts go by."""
        needed = self.needed(total)
        given = {
            "rule": json.dumps({name: value for name, value in asdict(self).items() if value}),
            "needed": needed,
            "max": self.max_in_flight,
            "waves": json.dumps(self.waves) if self.waves else None,
            "fail_fast": 1 if self.fail_fast else None,
        }
        return {name: value for name, value in given.items() if value is not None}


def shape(name: str, raw: Mapping[str, str], held: int) -> dict[str, Any]:
    """A batch as `--json` has it."""
    counters = {one: int(raw.get(one) or 0) for one in COUNTERS}
    return {
        "name": name,
        "created_at": raw.get("created_at"),
        "ended_at": raw.get("ended_at"),
        **counters,
        "held": held,
        "needed": int(raw["needed"]) if raw.get("needed") else None,
        "cancelled": raw.get("cancelled") == "1",
        "outcome": raw.get("outcome") or None,
        "rule": json.loads(raw.get("rule") or "{}"),
    }
