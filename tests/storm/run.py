"""A whole storm: its plan, part by part, with a judgement after each; and the table at its end."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.host.machine import snapshot
from tests.storm.blows import Tally, carry_out
from tests.storm.judge import judge
from tests.storm.plan import Plan, Round
from tests.storm.system import StormSystem


def run_storm(plan: Plan, folder: Path, subnet: str, say: Callable[[str], None]) -> Tally:
    """Carry the plan out in `folder`; ends at the first judgement that finds something.

    The journals and bundles are then copied to `found` in the folder, to look at; the machine is cleaned.
    """
    system, tally = StormSystem(folder, subnet), Tally()
    system.prepare(plan.mode)
    try:
        before = _calm(system)
        for part in plan.parts:
            _part(system, part, tally, before, say)
            if tally.findings:
                break
    finally:
        if tally.findings:
            for container_id in sorted({one for line in tally.findings for one in _ids(line)}):
                say(f"{container_id}: {system.rows().get(container_id)}")
            system.keep_and_clean(say)
        system.remove()
    return tally


def _calm(system: StormSystem) -> dict[str, list[str]]:
    """The machine as it is with one sandbox come and gone: the bridge and iptables' own tables stay."""
    system.spawn_calm()
    for network in ("bridged", "crowd"):
        system.cli("run", "--wait", "--network", network, "--", "sleep", "60")
    system.cli("rm", "--all")
    before = snapshot()
    system.stop()
    return before


def _part(
    system: StormSystem,
    part: tuple[Round, ...],
    tally: Tally,
    before: dict[str, list[str]],
    say: Callable[[str], None],
) -> None:
    began = time.monotonic()
    for one in part:
        say(str(one))
        carry_out(system, one, tally)
    verdict = judge(system, tally.ids, before)
    system.stop()
    tally.left_over += len(verdict.left_over)
    tally.lost += len(verdict.lost)
    tally.doubled += len(verdict.doubled)
    tally.findings += verdict.findings
    took_s = time.monotonic() - began
    settled = f"settled in {verdict.settle_s} s, all in {took_s:.0f} s"
    say(f"after round {part[-1].number}: {len(tally.ids)} sandboxes, {settled}")


def _ids(line: str) -> list[str]:
    return [word.strip(":,") for word in line.split() if word.startswith("sb-")]


def table(plan: Plan, tally: Tally) -> str:
    """What was tried, by kind, and what came of it."""
    rows = [(name, str(count)) for name, count in sorted(tally.tried.items())]
    rows += [
        ("worker kills", str(tally.kills)),
        ("sandboxes", str(len(tally.ids))),
        ("left over", str(tally.left_over)),
        ("lost", str(tally.lost)),
        ("doubled", str(tally.doubled)),
        ("seed", f"{plan.seed} ({plan.mode})"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count:>8}" for name, count in rows)
