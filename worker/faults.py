"""Fault points: named places where a crash matters, and what a test build of the settings does there.

`SANDBATCH_FAULTS=point:action[:nth]`, several with commas between them; refused unless
`SANDBATCH_ALLOW_FAULTS=1`. A point may be a pattern (`cni.*.ADD.before`). It acts at the nth time
that any process of the host passes it (1 unless given), once, also across restarts of the worker.

| points | passed by |
|---|---|
| `stage.STAGE.do`, `stage.STAGE.undo` | the stage runner |
| `journal.EVENT[.STAGE]` | each write of a journal |
| `netns.create`, `netns.delete`, `netns.inside` | netlink |
| `cni.PLUGIN.VERB`, `runsc.VERB`, `conmon.create`, other programs by name | the process runner |
| `skopeo.inspect`, `skopeo.copy`, `umoci.unpack`, `image.put` | each pull of an image |
| `message.TASK.publish`, `message.TASK.run` | each message of the broker |

Each with `.before` or `.after` behind it.
"""

import errno
import fnmatch
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from worker.errors import SandbatchError

RULE = re.compile(
    r"^(?P<point>[\w.*?\-]+):(?P<action>kill|exit1|hang|enospc|slow:\d+(?:\.\d+)?)(?::(?P<nth>[1-9]\d*))?$"
)
HANGING, FAILING = ("sleep", "infinity"), ("false",)


@dataclass(frozen=True)
class Rule:
    """At the nth pass of a point that fits the pattern, do the action."""

    point: str
    action: str
    nth: int


_rules: tuple[Rule, ...] = ()
_counts: Path | None = None
_worker_lock: Path | None = None


def parse(text: str) -> tuple[Rule, ...]:
    """The rules of `SANDBATCH_FAULTS`.

    Raises:
        ValueError: A rule is not `point:action[:nth]`.
    """
    rules = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        match = RULE.match(part)
        if match is None:
            raise ValueError(f"{part!r} is no point:action[:nth]; actions: kill, exit1, hang, slow:S, enospc")
        rules.append(Rule(match["point"], match["action"], int(match["nth"] or 1)))
    return tuple(rules)


def arm(text: str, run_dir: Path) -> None:
    """Have the rules act in this process and in those that it forks."""
    global _rules, _counts, _worker_lock
    _rules, _counts, _worker_lock = parse(text), run_dir / "faults", run_dir / "worker.lock"
    if _rules:
        _counts.mkdir(mode=0o700, parents=True, exist_ok=True)


def point(name: str) -> None:
    """Pass a point. Without faults this costs a look at an empty tuple."""
    for rule in _due(name):
        _act(rule, name)


def program(name: str, argv: list[str]) -> list[str]:
    """Pass the point before a program is run; returns what is run in its place: it may hang or fail."""
    for rule in _due(f"{name}.before"):
        if rule.action == "hang":
            argv = list(HANGING)
        elif rule.action == "exit1":
            argv = list(FAILING)
        else:
            _act(rule, name)
    return argv


def _due(name: str) -> list[Rule]:
    return [rule for rule in _rules if fnmatch.fnmatchcase(name, rule.point) and _count(rule) == rule.nth]


def _count(rule: Rule) -> int:
    """How often the rule's point has been passed, this time included: the length of a file."""
    assert _counts is not None  # noqa: S101 - arm() sets it with the rules
    name = re.sub(r"[^\w.\-]", "_", f"{rule.point}:{rule.action}:{rule.nth}")
    handle = os.open(_counts / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, b".")
        return os.lseek(handle, 0, os.SEEK_CUR)  # O_APPEND: behind our own byte
    finally:
        os.close(handle)


def _act(rule: Rule, name: str) -> None:
    if rule.action == "kill":
        _kill_worker()
    elif rule.action == "exit1":
        raise SandbatchError(f"fault point {name}", "fails as SANDBATCH_FAULTS says", "")
    elif rule.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif rule.action == "hang":
        while True:
            signal.pause()
    else:
        time.sleep(float(rule.action.partition(":")[2]))


def _kill_worker() -> None:
    """SIGKILL to the worker's main process, then to this one: at this very point."""
    assert _worker_lock is not None  # noqa: S101 - arm() sets it with the rules
    os.kill(int(_worker_lock.read_text()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
