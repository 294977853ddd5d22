"""The egress policies that are loaded, compared with those that journals say are loaded."""

from collections.abc import Iterable

from worker import nft
from worker.egress import journaled
from worker.egress_rules import BASES, DENIED, TABLE, Ruleset, ruleset
from worker.journal import Journal

OPEN = "it runs without its policy; audit --mend loads it again"
UNSEEN = "nft is not on the PATH, nobody can see it; install nftables"
ID_LENGTH = len("sb-0123456789abcdef")


def loaded(held: nft.Held) -> dict[str, str]:
    """What is in our tables: name -> id of its sandbox; a table that no sandbox uses has none."""
    owners = {f"chain {family} {TABLE} {name}": _owner(name) for family, name in held.chains if _owner(name)}
    owners |= {f"set {family} {TABLE} {name}": _owner(name) for family, name in held.sets if _owner(name)}
    return owners or {f"table {family} {TABLE}": "" for family in held.tables}


def missing(journals: Iterable[Journal], held: nft.Held | None) -> dict[str, str]:
    """Ids among `journals`, all of which should have a policy, whose policy is not whole -> what is wrong.

    That each chain has as many rules as were loaded is looked at, not what they say.
    """
    found = {}
    for known in journals:
        spec, container_id = known.spec, known.container_id
        if held is None:
            found[container_id] = UNSEEN
        elif lacks := _lacks(ruleset(container_id, journaled(known), spec.egress, spec.isolate), held):
            found[container_id] = f"{lacks}; {OPEN}"
    return found


def _lacks(made: Ruleset, held: nft.Held) -> str:
    """The first thing that is not as it was loaded; empty if everything is."""
    for family in made.families:
        base = {name: rules for name, (_, rules) in BASES[family].items()} | {DENIED: ("drop",)}
        for name, rules in base.items():
            if held.chains.get((family, name)) != len(rules):
                return f"chain {family} {TABLE} {name} is not as it was made"
    for key, chain in made.elements.items():
        if held.elements.get(key) != chain:
            family, map_name, link = key
            return f"{link} is not in map {family} {TABLE} {map_name}"
    for (family, name), own in made.chains.items():
        if held.chains.get((family, name)) != len(own):
            return f"chain {family} {TABLE} {name} is not as it was made"
    return ""


def _owner(name: str) -> str:
    return name[:ID_LENGTH] if name[:3] == "sb-" and name[ID_LENGTH : ID_LENGTH + 1] == "-" else ""
