"""What people write on the command line, as the parts of a spec: sizes, ports, networks, mounts."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from worker import spec_parts
from worker.errors import BadInput

RATE = re.compile(r"^(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[kmg]?)(?:bit)?$", re.IGNORECASE)
UNITS = ("", "k", "m", "g")
PUBLISH = re.compile(
    r"^(?:(?P<ip>\[[0-9a-fA-F:.]+\]|[0-9]+(?:\.[0-9]+){3}):)?(?:(?P<host>[0-9]{0,5}):)?(?P<port>[0-9]{1,5})"
    r"(?:/(?P<protocol>[a-z]+))?$"
)

DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd])")
DURATION = re.compile(f"(?:{DURATION_PART.pattern})+")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def pair(text: str, flag: str) -> tuple[str, str]:
    """`K=V` as a pair."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise BadInput(f"{flag} {text}", "KEY=VALUE is needed", f"for example {flag} colour=red")
    return name, value


def size(text: str, flag: str) -> int:
    """Bytes; `512m` counts by 1024, as docker does."""
    try:
        return spec_parts.size(text)
    except ValueError:
        raise BadInput(f"{flag} {text}", "a size is needed", "for example 512m or 2g") from None


def rate(text: str, flag: str) -> int:
    """Bits a second; `10m` counts by 1000, as network people do."""
    match = RATE.fullmatch(text.strip())
    if match is None:
        raise BadInput(f"{flag} {text}", "a rate in bits a second is needed", "for example 10m")
    try:
        return spec_parts.whole(float(match["number"]) * 1000 ** UNITS.index(match["unit"].lower()))
    except ValueError as error:
        raise BadInput(f"{flag} {text[:40]}", str(error), "for example 10m") from None


def network(text: str) -> dict[str, Any]:
    """`NAME[:ip=ADDRESS,mac=ADDRESS,alias=NAME]`, as podman has it."""
    name, _, rest = text.partition(":")
    made: dict[str, Any] = {"name": name, "ips": [], "aliases": []}
    for option in filter(None, rest.split(",")):
        key, value = pair(option, f"--network {name}:")
        if key == "ip":
            made["ips"].append(value)
        elif key == "alias":
            made["aliases"].append(value)
        elif key == "mac":
            made["mac"] = value
        else:
            raise BadInput(f"--network {text}", f"no option {key!r}", "ip=, mac= or alias=")
    return made


def publish(text: str) -> dict[str, Any]:
    """`[IP:][HOSTPORT:]PORT[/tcp|udp|sctp]`; without a host port the host chooses one."""
    match = PUBLISH.fullmatch(text)
    if match is None:
        todo = "for example 8080:80 or 127.0.0.1:5353:53/udp"
        raise BadInput(f"--publish {text}", "[IP:][HOSTPORT:]PORT[/tcp|udp|sctp] is needed", todo)
    made: dict[str, Any] = {"port": int(match["port"]), "host_port": int(match["host"] or 0)}
    if match["ip"]:
        made["host_ip"] = match["ip"].strip("[]")
    if match["protocol"]:
        made["protocol"] = match["protocol"]
    return made


def bandwidth(text: str) -> dict[str, int]:
    """`in=RATE,out=RATE[,in-burst=BITS,out-burst=BITS]`, seen from the sandbox."""
    names = {
        "in": "ingress_rate",
        "out": "egress_rate",
        "in-burst": "ingress_burst",
        "out-burst": "egress_burst",
    }
    made = {}
    for option in text.split(","):
        key, value = pair(option, "--bandwidth")
        if key not in names:
            raise BadInput(f"--bandwidth {text}", f"no option {key!r}", f"one of {', '.join(names)}")
        made[names[key]] = rate(value, f"--bandwidth {key}=")
    return made


def egress(rules: Iterable[str]) -> list[str] | None:
    """`deny`, or what alone is allowed; None where nothing was said."""
    given = [rule for text in rules for rule in text.split(",")]
    if "deny" in given and len(given) > 1:
        raise BadInput(
            "--egress deny", "rules are given as well", "leave deny out: what no rule allows is denied"
        )
    return None if not given else [rule for rule in given if rule != "deny"]


def bind(text: str) -> dict[str, Any]:
    """`SOURCE:TARGET[:ro]`; binds are read-only, said or not."""
    parts = text.split(":")
    if len(parts) == 3 and parts[2] == "ro":
        parts.pop()
    if len(parts) != 2:
        why = "binds are read-only" if parts[2:] == ["rw"] else "SOURCE:TARGET is needed"
        raise BadInput(f"--volume {text}", why, "for example /srv/data:/data")
    return {"type": "bind", "source": parts[0], "target": parts[1]}


def tmpfs(text: str) -> dict[str, Any]:
    """`TARGET[:size=SIZE]`."""
    target, _, option = text.partition(":")
    made: dict[str, Any] = {"type": "tmpfs", "target": target}
    if option:
        key, value = pair(option, f"--tmpfs {target}:")
        if key != "size":
            raise BadInput(f"--tmpfs {text}", f"no option {key!r}", "size=")
        made["size_bytes"] = size(value, f"--tmpfs {target}:size=")
    return made


def writable(text: str) -> dict[str, Any]:
    """`memory`, `disk` or `no`, with `:SIZE`."""
    kind, _, limit = text.partition(":")
    made: dict[str, Any] = {"writable": kind}
    if limit:
        made["writable_bytes"] = size(limit, f"--writable {kind}:")
    return made


def name_and_address(text: str) -> tuple[str, str]:
    """`NAME:ADDRESS`, as docker's --add-host."""
    name, colon, address = text.partition(":")
    if not colon:
        raise BadInput(f"--add-host {text}", "NAME:ADDRESS is needed", "for example --add-host db:10.0.0.5")
    return name, address.strip("[]")


def duration(text: str, flag: str) -> float:
    """Seconds; `1h30m` and `500ms` say their units."""
    try:
        return float(text)
    except ValueError:
        pass
    if not DURATION.fullmatch(text):
        raise BadInput(f"{flag} {text}", "a time is needed", "for example 90, 10m or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, unit in DURATION_PART.findall(text))


def moment(text: str, flag: str = "--deadline") -> str:
    """A time from now, as of `duration`, or a moment in RFC 3339, as the latter."""
    try:
        seconds = duration(text, flag)
    except BadInput:
        return text  # the spec says whether it is one
    if not 0 < seconds <= 10**9:
        raise BadInput(f"{flag} {text}", "a time from now is needed, or a moment", "for example 3600 or 1h")
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def instant(text: str) -> datetime:
    """A moment in RFC 3339, with its zone."""
    try:
        return datetime.fromisoformat(spec_parts.stamp(text))
    except ValueError as error:
        raise BadInput(f"deadline {text}", str(error), "for example 10m or 2027-01-31T12:00:00Z") from None


def since(text: str | None) -> dict[str, float]:
    """Seconds ago, by the host's clock, or a moment in RFC 3339."""
    if text is None:
        return {}
    try:
        return {"since_s": float(text)}
    except ValueError:
        pass
    try:
        return {"since_at": datetime.fromisoformat(text).timestamp()}
    except (ValueError, OverflowError):  # of a moment before the calendar there are no seconds
        why, todo = "seconds are needed, or a moment", "for example 60 or 2026-11-25T08:00:00Z"
        raise BadInput(f"--since {text}", why, todo) from None
