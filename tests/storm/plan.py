"""What a storm does: a pure function of its seed, so that a finding can be looked for again.

Which process is where when a blow falls is not repeatable; what is done, and in which order, is.
"""

import random
from dataclasses import dataclass

ROUNDS = 10  # between two looks at everything
MODES = ("up", "worker")  # the embedded broker dies with its `up`; a broker of one's own comes back alone

# Fault points as patterns; the worker is killed at the nth passing, by whichever process passes it.
POINTS = (
    "journal.begun.*",
    "journal.done.*",
    "journal.undo.*",
    "journal.undone.*",
    "journal.attempt.*",
    "journal.facts.*",
    "stage.*.do.*",
    "stage.*.undo.*",
    "netns.*",
    "cni.*.ADD.*",
    "cni.*.DEL.*",
    "conmon.create.*",
    "runsc.start.*",
    "nft.*",
    "cgroup.remove.*",
    "message.place.*",
    "message.ready.*",
    "message.unwind.*",
    "message.ended.*",
    "message.restart.*",
    "message.stop.*",
    "message.undo.*",
    "message.image.*",
    "message.fetched.*",
    "image.*",
    "skopeo.*",
    "umoci.*",
    "message.*.publish.*",
    "message.*.run.*",
    "*",
)
MISCHIEF = ("exit1", "enospc", "slow:0.4", "hang")  # faults that leave the worker alive
PLUGINS = ("bridge", "host-local", "storm")
MISDEEDS = ("exit1", "hang", "garbage", "late", "dies")
KINDS = ("server", "server", "laden", "laden", "short", "ageing", "failing", "absent", "silent", "crowd")
KINDS += ("image", "image")
BLOWS = ("fault",) * 9 + ("worker",) * 4 + ("early",) * 3 + ("tini",) * 2 + ("up",) * 2 + ("broker",) * 3
ROLES = ("conmon", "sandbox", "gofer")


@dataclass(frozen=True)
class Act:
    """One thing to do while the worker runs: `number` is a count, or picks among what is there."""

    verb: str  # launch, remove, stop, kill, plugin, heal
    what: str = ""
    number: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.verb, self.what, str(self.number) if self.number else "")))


@dataclass(frozen=True)
class Round:
    """One life of a worker: its faults, what is asked of it, and how it is killed, `after_s` later."""

    number: int
    faults: str
    acts: tuple[Act, ...]
    blow: str
    after_s: float
    away_s: float  # how long a killed broker stays away

    def __str__(self) -> str:
        acts = ", ".join(map(str, self.acts))
        return f"round {self.number}: faults [{self.faults}] acts [{acts}] then {self.blow} +{self.after_s}s"


@dataclass(frozen=True)
class Plan:
    """All rounds of one seed."""

    seed: int
    mode: str
    rounds: tuple[Round, ...]

    @property
    def parts(self) -> list[tuple[Round, ...]]:
        """The rounds between two looks."""
        return [self.rounds[start : start + ROUNDS] for start in range(0, len(self.rounds), ROUNDS)]


def make_plan(seed: int, kills: int) -> Plan:
    """The plan of a seed: each round ends with the death of a worker. A longer one begins alike."""
    dice = random.Random(seed)  # noqa: S311 - repeatable on purpose
    mode = MODES[seed % 2]
    return Plan(seed, mode, tuple(_round(dice, number) for number in range(1, kills + 1)))


def _round(dice: random.Random, number: int) -> Round:
    blow = dice.choice(BLOWS)
    rules = [_rule(dice, "kill")] if blow == "fault" else []
    if dice.random() < 0.35:
        rules.append(_rule(dice, dice.choice(MISCHIEF)))
    acts = [_act(dice) for _ in range(dice.randint(1, 4))]
    return Round(
        number,
        ",".join(rules),
        tuple(acts),
        blow,
        after_s=round(dice.uniform(0.1, 2.5), 2),
        away_s=round(dice.choice((0.0, 0.5, 3.0)), 2),
    )


def _rule(dice: random.Random, action: str) -> str:
    point = dice.choice(POINTS)
    nth = dice.randint(1, 60) if point == "*" else dice.choice((1, 1, 2, 3, 5, 8))
    return f"{point}:{action}:{nth}"


def _act(dice: random.Random) -> Act:
    verbs = ("launch", "remove", "stop", "kill", "plugin", "heal")
    verb = dice.choices(verbs, (50, 14, 8, 10, 10, 8))[0]
    if verb == "launch":
        return Act(verb, dice.choice(KINDS), dice.randint(1, 3))
    if verb == "kill":
        return Act(verb, dice.choice(ROLES), dice.randint(0, 9))
    if verb == "plugin":
        words = (dice.choice(PLUGINS), dice.choice(("ADD", "DEL")), dice.choice(MISDEEDS))
        return Act(verb, " ".join(words) if dice.random() < 0.9 else "storm gone")
    return Act(verb, number=dice.randint(0, 9) if verb in ("remove", "stop") else 0)
