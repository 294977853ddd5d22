"""What a sandbox knows of names: its own /etc/resolv.conf and /etc/hosts, bound over those of its rootfs.

They say what the CNI results and the spec say. runsc would make a bind's missing mount point in the
shared rootfs, on the host (measured), so a file is bound only where there is one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Any

from worker.attachments import Attached
from worker.errors import BadInput
from worker.rootfs import is_host, root_of
from worker.settings import Settings
from worker.spec import Spec
from worker.tree import Tree

RESOLV_CONF, HOSTS = "/etc/resolv.conf", "/etc/hosts"
BIND_OPTIONS = ("bind", "ro", "nosuid", "nodev", "noexec")
MOST_SERVERS = 3  # the C libraries read no more
WORD = re.compile(r"[\x21-\x7e]+")  # a plugin's text must not become a line of its own
LOCALHOST = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


@dataclass(frozen=True)
class Names:
    """Files of the bundle by name, the OCI binds for them, and what could not be bound."""

    files: dict[str, str] = field(default_factory=dict)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def names_of(
    spec: Spec, container_id: str, links: Sequence[Attached], settings: Settings, bundle: Path
) -> Names:
    """What a sandbox with these links gets. Looks at the rootfs, and changes nothing.

    Raises:
        BadInput: The spec names servers or hosts, and there is no file to bind them over.
    """
    made = Names()
    texts = {RESOLV_CONF: resolv_conf(spec, links), HOSTS: hosts(spec, container_id, links)}
    asked = {RESOLV_CONF: bool(spec.dns or spec.dns_search), HOSTS: bool(spec.hosts)}
    for target, text in texts.items():
        if not text:
            continue  # nobody names a server: what the rootfs has is as good
        lacking = _lacking(spec, target, settings)
        if lacking is None:
            name = PurePosixPath(target).name
            made.files[name] = text
            bind = {"destination": target, "type": "bind", "source": str(bundle / name)}
            made.mounts.append({**bind, "options": list(BIND_OPTIONS)})
        elif asked[target]:
            raise lacking
        else:
            made.notes.append(f"its {target} is not written: {lacking.why}")
    return made


def check(spec: Spec, settings: Settings) -> None:
    """Refuse what `names_of` will refuse, before anything is made.

    Raises:
        BadInput: As `names_of`.
    """
    names_of(spec, "", [], settings, Path("/"))


def resolv_conf(spec: Spec, links: Sequence[Attached]) -> str:
    """Name servers and search list; the spec's word counts before that of the networks, eth0's first."""
    known = [one.result.get("dns") or {} for one in links]
    servers = spec.dns or _each(filter(_is_address, _words(known, "nameservers")))
    domains = [one["domain"] for one in known if WORD.fullmatch(one.get("domain", ""))]
    search = spec.dns_search or _each(_words(known, "search")) or domains[:1]
    options = _each(_words(known, "options"))
    lines = [f"nameserver {one}" for one in servers[:MOST_SERVERS]]
    lines += [f"{key} {' '.join(some)}" for key, some in (("search", search), ("options", options)) if some]
    return "".join(f"{line}\n" for line in lines)


def hosts(spec: Spec, container_id: str, links: Sequence[Attached]) -> str:
    """localhost, the sandbox's own addresses with its names on each network, and the spec's hosts."""
    aliases = {one.name: one.aliases for one in spec.networks}
    lines = [
        f"{ip} {' '.join([container_id, *aliases.get(link.network, [])])}"
        for link in links
        for ip in link.ips
    ]
    lines += [f"{ip} {name}" for name, ip in spec.hosts.items()]
    return LOCALHOST + "".join(f"{line}\n" for line in lines)


def write(bundle: Path, names: Names) -> None:
    """Write the files into a bundle that is there. Safe to repeat, before its container is made."""
    for name, text in names.files.items():
        (bundle / name).write_text(text)
        (bundle / name).chmod(0o644)


def _words(known: Iterable[dict[str, Any]], key: str) -> list[str]:
    return [word for one in known for word in one.get(key) or [] if WORD.fullmatch(word)]


def _each(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _lacking(spec: Spec, target: str, settings: Settings) -> BadInput | None:
    """Why nothing can be bound there; None if it can. The generated root has both files."""
    path = PurePosixPath(target)
    for mount in spec.mounts:
        if path.is_relative_to(mount.target):
            return BadInput(
                target, f"the spec has a mount of its own at {mount.target}", "name one of the two"
            )
    if is_host(spec):
        return None
    tree = Tree(folder=root_of(spec, settings))
    here = tree.host_side(path)
    if tree.look(path.parent) == "dir" and tree.look(path) == "file" and here is not None and here.is_file():
        return None
    if spec.image is not None:  # the store has made it where it could
        why = f"the image has no plain file {target} to bind it over"
        return BadInput(target, why, "build one into the image")
    why = f"the rootfs has no plain file {target} to bind it over"
    return BadInput(target, why, f"make it there: mkdir -p {here and here.parent} && touch {here}")
