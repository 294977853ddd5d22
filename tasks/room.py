"""Room: what a host has to give, why it cannot take a sandbox, and why a sandbox still waits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.journal import now
from worker.limits import in_words
from worker.settings import MEMORY_PER_SANDBOX, Settings
from worker.spec import KINDS

MOST_NAMED = 3  # of hosts, labels, numbers in one line

Facts = Mapping[str, Any]


def offer(settings: Settings) -> dict[str, Any]:
    """What this host has in all, and its networks have left, for script TAKE."""
    from worker.network_room import network_room  # with it comes what only a host needs

    rooms = {name: -1 if room is None else room for name, room in network_room(settings).items()}
    return {
        "capacity": settings.capacity,
        "slots": settings.slots,
        "memory": settings.memory,
        "each": settings.default_memory or MEMORY_PER_SANDBOX,
        "labels": settings.labels,
        "rooms": rooms,
    }


@dataclass(frozen=True)
class Need:
    """What a host must have for a sandbox. Equal for the many of a batch, so that one answer does for all."""

    host: str | None
    on: tuple[tuple[str, str], ...]
    networks: tuple[str, ...]
    memory_bytes: int
    kind: str = KINDS[0]  # of its spec


def need_of(row: Mapping[str, Any]) -> Need:
    """Of a row of `ls`, or of a whole one, which has the spec."""
    if "spec" in row:
        spec = row["spec"]
        line = f"host:{spec['host']}" if spec.get("host") else ""
        pairs = tuple(sorted((spec.get("on") or {}).items()))
        memory, kind = spec.get("memory_bytes"), spec.get("kind")
    else:
        line, pairs, memory, kind = row.get("queue") or "", (), row.get("memory"), row.get("kind")
        if not line and row.get("host"):  # of a client of release 0.1.0
            line = f"host:{row['host']}"
    if line.startswith("on:"):
        pairs = tuple((name, value) for name, _, value in (one.partition("=") for one in line[3:].split(",")))
    host = line[5:] if line.startswith("host:") else None
    return Need(host, pairs, tuple(row["networks"]), int(memory or MEMORY_PER_SANDBOX), kind or KINDS[0])


def unavailable(facts: Facts) -> str:
    """`host a is lost since …`: why a host takes nothing at all until somebody acts; empty if it does."""
    kind, words = _not_now(Need(None, (), (), 0), facts)
    return f"host {facts['name']} {words}" if kind in ("away", "drained") else ""


def misfit(need: Need, facts: Facts) -> str:
    """Why a host, as it speaks of itself, cannot take such a sandbox now; empty if it can."""
    return _never(need, facts) or _not_now(need, facts)[1]


def _never(need: Need, facts: Facts) -> str:
    """What a wait will not change."""
    if need.host not in (None, facts["name"]):
        return f"it is not {need.host}"
    if not _knows(need, facts):
        return f"has release {facts['version']}, which does not know {need.kind}: upgrade it"
    if lacking := _lacking(need.on, facts):
        return f"has no label {lacking}"
    for name in need.networks:
        if name not in facts["networks"]:
            return f"has no network {name}"
    budget = facts.get("memory")
    if budget and need.memory_bytes > budget:
        return f"has {in_words(budget)} of memory for sandboxes"
    return ""


def _not_now(need: Need, facts: Facts) -> tuple[str, str]:
    """What holds it back at the moment: the kind of it, and in words."""
    if facts.get("state", "live") != "live":
        return "away", f"is {facts['state']} since {moment(facts['heartbeat_at'])}"
    drain = facts.get("drained")
    if drain and drain["drained"]:
        return "drained", "is drained" + (f": {drain['why']}" if drain.get("why") else "")
    capacity, sandboxes = facts["capacity"], facts["sandboxes"]
    if sandboxes >= capacity:
        return "full", f"is full ({sandboxes} of {capacity})"
    if facts.get("not_ready"):
        return "not ready", f"is not ready: {facts['not_ready']}"
    budget, asked = facts.get("memory"), facts.get("memory_asked") or 0
    if budget and asked + need.memory_bytes > budget:
        return "memory", f"has {in_words(max(0, budget - asked))} of {in_words(budget)} of memory left"
    for name in need.networks:
        if (facts.get("network_room") or {}).get(name) == 0:
            return f"network {name}", f"has no free address or port on network {name}"
    if facts.get("launching", 0) >= facts["slots"]:
        return "busy", f"launches as many at once as it may ({facts['launching']} of {facts['slots']})"
    return "", ""


def _knows(need: Need, facts: Facts) -> bool:
    return need.kind in facts.get("kinds", KINDS[:1])  # release 0.1.0 does not say which


def _lacking(on: Iterable[tuple[str, str]], facts: Facts) -> str:
    labels = facts.get("labels") or {}
    return ", ".join(f"{name}={value}" for name, value in on if labels.get(name) != value)


# -- why a sandbox waits ---------------------------------------------------------------------------


def why_queued(
    row: Mapping[str, Any], hosts: Mapping[str, Facts], batch: Mapping[str, Any] | None = None
) -> str:
    """Why a queued sandbox still waits, in words for people.

    Args:
        row: Of `ls` or `show`; `held` where its batch has not let it go.
        hosts: All that are known, each with `state`: live, lost, stopped (`Record.all_hosts`).
        batch: That of the sandbox, as `Record.batch` has it; asked only where it is held.
    """
    if row.get("held"):
        return _held(batch)
    return why(need_of(row), hosts)


def _held(batch: Mapping[str, Any] | None) -> str:
    rule = (batch or {}).get("rule") or {}
    reasons = []
    if rule.get("max_in_flight"):
        reasons.append(f"max_in_flight {rule['max_in_flight']}")
    if rule.get("waves"):
        reasons.append(f"waves {', '.join(str(one) for one in rule['waves'])}")
    return "held back by its batch" + (f" ({'; '.join(reasons)})" if reasons else "")


def why(need: Need, hosts: Mapping[str, Facts]) -> str:
    """Why what has this need waits: of everything in its way the first that an administrator can change."""
    if need.host is not None:
        if need.host not in hosts:
            return f"host {need.host} is not known"
        reason = misfit(need, hosts[need.host])
        return f"host {need.host} {reason}" if reason else "next to be taken"
    live = [facts for facts in hosts.values() if facts.get("state", "live") == "live"]
    if not live:
        lost = [facts for facts in hosts.values() if facts["state"] == "lost"]
        return "no host is up" + (f" ({_some(_named(one) for one in lost)})" if lost else "")
    return _no_such_host(need, live, hosts) or _all_occupied(need, live)


def _named(facts: Facts) -> str:
    return f"{facts['name']} is {facts['state']} since {moment(facts['heartbeat_at'])}"


def _no_such_host(need: Need, live: Sequence[Facts], hosts: Mapping[str, Facts]) -> str:
    """What none of the hosts that live has."""
    if not any(_knows(need, facts) for facts in live):
        releases = _some(f"{facts['name']} has release {facts['version']}" for facts in live)
        return f"no host that is up knows {need.kind} ({releases}): upgrade one"
    labelled = [facts for facts in live if not _lacking(need.on, facts)]
    if not labelled:
        wanted = ", ".join(f"{name}={value}" for name, value in need.on)
        away = [facts for facts in hosts.values() if not _lacking(need.on, facts)]
        if away:
            return f"no host that is up has {wanted} ({_some(_named(one) for one in away)})"
        return f"no host has {wanted}; labels known: {known_labels(live)}"
    for name in need.networks:
        if not any(name in facts["networks"] for facts in labelled):
            return f"no host {_with(need)}has network {name}"
    fit = [facts for facts in labelled if all(name in facts["networks"] for name in need.networks)]
    if not fit:
        return f"no host {_with(need)}has networks {' and '.join(need.networks)}"
    if not any(not _never(need, facts) for facts in fit):
        most = max(fit, key=lambda facts: int(facts["memory"]))
        return (
            f"asks for {in_words(need.memory_bytes)} of memory: "
            f"the most that a host {_with(need)}has is {in_words(most['memory'])} ({most['name']})"
        )
    return ""


def _with(need: Need) -> str:
    return f"with {', '.join(f'{name}={value}' for name, value in need.on)} " if need.on else ""


def _all_occupied(need: Need, live: Sequence[Facts]) -> str:
    """What holds it back on those hosts that could have it."""
    groups: dict[str, list[Facts]] = {}
    for facts in live:
        if not _never(need, facts):
            groups.setdefault(_not_now(need, facts)[0], []).append(facts)
    if "" in groups:
        return "next to be taken"
    if len(groups) == 1:
        ((kind, group),) = groups.items()
        return _all(kind, group, need)
    return ", ".join(
        f"{len(group)} host{'s' if len(group) > 1 else ''} {_several(kind, group, need)}"
        for kind, group in groups.items()
    )


def _all(kind: str, group: Sequence[Facts], need: Need) -> str:
    if len(group) == 1:
        return f"host {group[0]['name']} {_not_now(need, group[0])[1]}"
    if kind.startswith("network "):
        return f"{kind} has no free address or port on {_some(str(one['name']) for one in group)}"
    return f"all {len(group)} hosts {_several(kind, group, need)}"


def _several(kind: str, group: Sequence[Facts], need: Need) -> str:
    if len(group) == 1:
        return _not_now(need, group[0])[1]
    if kind == "full":
        counts = (f"{one['sandboxes']} of {one['capacity']}" for one in group)
        return f"are full ({_some(counts)})"
    if kind == "drained":
        reasons = dict.fromkeys(one["drained"]["why"] for one in group if one["drained"].get("why"))
        return "are drained" + (f": {_some(reasons)}" if reasons else "")
    if kind == "not ready":
        return f"are not ready: {_some(dict.fromkeys(str(one['not_ready']) for one in group))}"
    if kind == "memory":
        left = (in_words(max(0, one["memory"] - (one["memory_asked"] or 0))) for one in group)
        return f"have less than {in_words(need.memory_bytes)} of memory left ({_some(left)})"
    if kind == "busy":
        at_once = (f"{one['launching']} of {one['slots']}" for one in group)
        return f"launch as many at once as they may ({_some(at_once)})"
    return f"have no free address or port on {kind}"


def known_labels(hosts: Iterable[Facts]) -> str:
    """The labels of hosts, in words."""
    pairs = {f"{name}={value}" for facts in hosts for name, value in (facts.get("labels") or {}).items()}
    return ", ".join(sorted(pairs)) or "none"


def _some(words: Iterable[str]) -> str:
    found = list(words)
    return ", ".join(found if len(found) <= MOST_NAMED else [*found[:MOST_NAMED], "…"])


def moment(stamp: str) -> str:
    """A time of the record, to the second; without its day if that is today."""
    day, _, time = stamp.partition("T")
    short = f"{time[:8]}Z"
    return short if now().startswith(day) else f"{day}T{short}"
