"""Ports of this host that its sandboxes publish: reserved before ADD, released after DEL.

portmap reserves nothing: of two rules for one port the last wins, and takes the traffic of a program
that listens there. A reservation is a symlink below `run_dir`, named by protocol, address and port;
where it leads is the sandbox's id. It goes with a reboot, as the rules do.
"""

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from worker import process
from worker.errors import Busy, SandbatchError
from worker.locks import lock_within
from worker.settings import Settings
from worker.spec_parts import Publish

NAME = re.compile(r"^(?P<protocol>[a-z]+)-(?P<ip>\*|[0-9a-f.:]+)-(?P<port>[0-9]+)$")
FORWARD = re.compile(
    r"^-A (?P<chain>\S+) (?:-d (?P<ip>[0-9a-f.:]+)(?:/32|/128) )?(?:.* )?-p (?P<protocol>\w+) "
    r".*--dport (?P<port>\d+) .*-j DNAT "
)
EVERY = "*"
LOCK_WAIT_S = 10.0  # held for the time of some dozen system calls
KINDS = {
    "tcp": (socket.SOCK_STREAM, 0),
    "udp": (socket.SOCK_DGRAM, 0),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


class _Port(NamedTuple):
    protocol: str
    ip: str  # EVERY: all addresses of both families
    port: int

    @property
    def name(self) -> str:
        return f"{self.protocol}-{self.ip}-{self.port}"

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol}" + ("" if self.ip == EVERY else f" on {self.ip}")

    def overlaps(self, other: "_Port") -> bool:
        return self[::2] == other[::2] and _overlap(self.ip, other.ip)


def reserve(
    settings: Settings, container_id: str, asked: Sequence[Publish], before: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Reserve what is asked for, all of it or an error; where no host port is given, choose a free one.

    Each as `show` has it: {host_ip, host_port, port, protocol}, `host_ip` None for every address.
    `before` is what the sandbox had last time: it keeps its ports where they are still free.

    Raises:
        SandbatchError: A port is taken, and by whom; or none is left. Some may be reserved: `release`.
    """
    with _locked(settings) as folder:
        taken = _forwarded() | _forget_own(folder, container_id)
        chosen: dict[int, int] = {}
        for index in sorted(range(len(asked)), key=lambda one: asked[one].host_port == 0):
            one = asked[index]
            port = _free(one, taken, settings, before) if one.host_port == 0 else _wanted(one, taken)
            (folder / port.name).symlink_to(container_id)
            taken[port] = container_id
            chosen[index] = port.port
    return [{**one.model_dump(), "host_port": chosen[index]} for index, one in enumerate(asked)]


def release(settings: Settings, container_id: str) -> None:
    """Give back what a sandbox has reserved. Safe to repeat. Nobody else takes a name that is there."""
    for path, owner in reserved(settings).items():
        if owner == container_id:
            Path(path).unlink(missing_ok=True)


def reserved(settings: Settings) -> dict[str, str]:
    """Every reservation of this host -> the id that has it; empty for what is none of ours."""
    folder = settings.ports_dir
    return {str(folder / name): _owner(folder / name) for name in _names(folder)}


def reservations(settings: Settings, published: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths of what `reserve` has returned."""
    ports = [_Port(one["protocol"], one["host_ip"] or EVERY, one["host_port"]) for one in published]
    return [str(settings.ports_dir / port.name) for port in ports]


@contextmanager
def _locked(settings: Settings) -> Iterator[Path]:
    """The folder under its own lock: which ports overlap, the file system cannot know."""
    folder = settings.ports_dir
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_within(handle, LOCK_WAIT_S):
            raise Busy("ports of this host", "others reserve some just now", "it is tried again")
        yield folder
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _owner(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # released just now, or no link


def _forget_own(folder: Path, container_id: str) -> dict[_Port, str]:
    """Drop what an attempt of this sandbox before has left; returns what others have."""
    taken = {}
    for name in _names(folder):
        match, owner = NAME.fullmatch(name), _owner(folder / name)
        if owner == container_id:
            (folder / name).unlink()
        elif match is not None:
            taken[_Port(match["protocol"], match["ip"], int(match["port"]))] = owner
    return taken


def _forwarded() -> dict[_Port, str]:
    """Ports that iptables forwards already: of podman's containers, or of another sandbatch's."""
    found = {}
    for program, every in (("iptables-save", "0.0.0.0"), ("ip6tables-save", "::")):  # noqa: S104
        if shutil.which(program) is None:
            continue
        # Without the table there is nothing in it; without root there is no ADD either.
        for line in process.run([program, "-t", "nat"], timeout_s=30).stdout.splitlines():
            rule = FORWARD.match(line)
            if rule and rule["protocol"] in KINDS:
                port = _Port(rule["protocol"], rule["ip"] or every, int(rule["port"]))
                found[port] = f"a rule of the host's iptables (chain {rule['chain']})"
    return found


def _is_same(old: Mapping[str, Any], asked: Publish) -> bool:
    return all(old.get(name) == getattr(asked, name) for name in ("host_ip", "port", "protocol"))


def _wanted(asked: Publish, taken: Mapping[_Port, str]) -> _Port:
    port = _Port(asked.protocol, asked.host_ip or EVERY, asked.host_port)
    for other, owner in taken.items():
        if port.overlaps(other):
            raise _taken(port, f"by {owner}")
    if _is_in_use(port):
        raise _taken(port, "by another program of the host")
    return port


def _free(
    asked: Publish, taken: Mapping[_Port, str], settings: Settings, before: Sequence[Mapping[str, Any]]
) -> _Port:
    """The port of last time; else any of the range, those that other ports of the sandbox had last."""
    kept = [old["host_port"] for old in before if _is_same(old, asked)]
    others = [old["host_port"] for old in before if not _is_same(old, asked)]
    first, last = settings.publish_range
    count = last - first + 1
    start = secrets.randbelow(count)  # not the one that was given back last: clients may still know it
    rest = (first + (start + step) % count for step in range(count))
    for number in chain(kept, (one for one in rest if one not in others), others):
        port = _Port(asked.protocol, asked.host_ip or EVERY, number)
        if not any(port.overlaps(other) for other in taken) and not _is_in_use(port):
            return port
    why = f"none of {settings.publish_ports} is free for {asked.protocol}"
    raise SandbatchError("host port", why, "set SANDBATCH_PUBLISH_PORTS on the host")


def _taken(port: _Port, by: str) -> SandbatchError:
    return SandbatchError(f"port {port}", f"is taken {by}", "name another, or none: the host then chooses")


def _overlap(one: str, other: str) -> bool:
    if EVERY in (one, other) or one == other:
        return True
    first, second = ip_address(one), ip_address(other)
    return first.version == second.version and (first.is_unspecified or second.is_unspecified)


def _is_in_use(port: _Port) -> bool:
    """Whether a program of this host has the port, on any address that is meant: then none can bind it."""
    families = {
        4: (socket.AF_INET, "0.0.0.0"),  # noqa: S104 - it asks for every address, and listens on none
        6: (socket.AF_INET6, "::"),
    }
    if port.ip != EVERY:
        version = ip_address(port.ip).version
        return _refuses(port, families[version][0], port.ip)
    return any(_refuses(port, family, every) for family, every in families.values())


def _refuses(port: _Port, family: int, ip: str) -> bool:
    kind, protocol = KINDS[port.protocol]
    try:
        with socket.socket(family, kind, protocol) as one:
            if port.protocol == "tcp":  # connections that have just ended are nobody's
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((ip, port.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return True
        if error.errno == errno.EADDRNOTAVAIL and port.ip != EVERY:
            why = "this host has no such address"
            raise SandbatchError(f"port {port}", why, "name one of its own, or none") from None
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
            raise SandbatchError(f"port {port}", str(error.strerror), "see dmesg") from error
    return False  # what this kernel has not, nobody listens on
