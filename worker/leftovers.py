"""Removal by hand of what plugins cannot undo any more: leases, masquerade chains, links, mounts.

Nothing here asks whether it may: `worker.mend` has the proof that the sandbox is dead.
"""

import ctypes
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from pyroute2 import IPRoute

from worker import netns
from worker.audit import CHAIN, MASQUERADE_TABLE, nat_programs, output
from worker.errors import Busy, SandbatchError
from worker.locks import lock_within
from worker.mounted import mounts_of

LOCK_WAIT_S = 10.0  # an IPAM plugin holds its lock for one look through the leases
OWNER = re.compile(r'id: "([^"]*)"')  # in the comments that the plugins give their rules
NFT_RULE = re.compile(r'comment "(?P<comment>[^"]*)".* # handle (?P<handle>\d+)$')
UMOUNT_NOFOLLOW = 8


def free_leases(container_id: str, folders: Iterable[Path]) -> None:
    """Free the addresses that host-local has lent to an id, under host-local's own lock."""
    for folder in folders:
        if not any(_lent_to(container_id, folder)):
            continue
        handle = os.open(folder / "lock", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _lock(handle, folder)
            for lease in _lent_to(container_id, folder):
                lease.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _lent_to(container_id: str, folder: Path) -> list[Path]:
    """Leases of one id; a lease is a plain file whose first line is its owner."""
    found = []
    for lease in sorted(folder.iterdir()) if folder.is_dir() else []:
        if lease.is_symlink() or not lease.is_file():
            continue
        try:
            owner = lease.read_bytes().split(b"\n")[0].strip()
        except FileNotFoundError:
            continue  # freed just now
        if owner == container_id.encode():
            found.append(lease)
    return found


def _lock(handle: int, folder: Path) -> None:
    if not lock_within(handle, LOCK_WAIT_S):
        raise Busy(f"leases in {folder}", "an IPAM plugin holds their lock", "try again")


def remove_chains(container_id: str, names: set[str]) -> None:
    """Remove the masquerade and forward chains of one id, and the jumps to them.

    Which are its own is said by the comments of their rules, all of which must name it; of one
    without comments by its name alone, one of `names`.
    """
    for program in nat_programs():
        text = output(f"{program}-save", "-t", "nat")
        rules = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("-A ")]
        for chain in CHAIN.findall(text):
            inside = [rule for rule in rules if rule[0] == chain]
            jumps = [rule for rule in rules if rule[0] != chain and _target(rule) == chain]
            owners = {owner for rule in (*inside, *jumps) for owner in _owners(rule)}
            # portmap gives only the jump a comment: without it, the name alone says whose the rules are.
            may_be_its_own = not owners and (not inside or chain.startswith("CNI-DN-"))
            if owners == {container_id} or (chain in names and may_be_its_own):
                nat = [program, "--wait", "-t", "nat"]
                for rule in jumps:
                    output(*nat, "-D", *rule)
                output(*nat, "-F", chain)
                output(*nat, "-X", chain)
    if shutil.which("nft") and MASQUERADE_TABLE in output("nft", "list", "tables"):
        _remove_nft_rules(container_id)


def _target(rule: list[str]) -> str:
    return rule[rule.index("-j") + 1] if "-j" in rule else ""


def _owners(rule: list[str]) -> list[str]:
    comments = [after for word, after in itertools.pairwise(rule) if word == "--comment"]
    return [owner for comment in comments for owner in OWNER.findall(comment)]


def _remove_nft_rules(container_id: str) -> None:
    chain = ""
    for line in output("nft", "--handle", "list", "table", "inet", MASQUERADE_TABLE).splitlines():
        words = line.split()
        if words[:1] == ["chain"]:
            chain = words[1]
        rule = NFT_RULE.search(line)
        if rule and re.search(rf"(?<![\w-]){container_id}(?![\w-])", rule["comment"]):
            output("nft", "delete", "rule", "inet", MASQUERADE_TABLE, chain, "handle", rule["handle"])


def stray_links(candidates: set[str], masters: set[str]) -> dict[str, str]:
    """Those of `candidates`, host ends of veth pairs, that are on one of the bridges `masters`.

    Returns:
        Name of the link -> the netns in which its other end is, empty for one that leads nowhere:
        to this netns, or to one without a name and without a process.
    """
    with IPRoute() as ipr:
        links = list(ipr.get_links())
    names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in links}
    found: dict[str, str] = {}
    pairs: dict[tuple[int, int], str] = {}  # (own index, index of the other end)
    for link in links:
        name = names[link["index"]]
        if name in candidates and names.get(link.get_attr("IFLA_MASTER") or 0) in masters:
            found[name] = ""
            if link.get_attr("IFLA_LINK_NETNSID") is not None:
                pairs[link["index"], link.get_attr("IFLA_LINK") or 0] = name
    if pairs:
        for path in _all_netns():
            for pair in _pairs_in(path) & pairs.keys():
                found[pairs[pair]] = str(path)
    return found


def _all_netns() -> list[Path]:
    """One path for each netns of this machine that has a name or a process, our own left out."""
    own = os.stat(netns.OWN_NETNS)
    paths: dict[int, Path] = {}
    named = [netns.netns_path(name) for name in netns.list_netns()]
    lived_in = [Path("/proc", pid, "ns", "net") for pid in os.listdir("/proc") if pid.isdecimal()]
    for path in (*named, *lived_in):
        try:
            there = path.stat()
        except OSError:
            continue  # it has just ended
        if there.st_dev == own.st_dev and there.st_ino != own.st_ino:
            paths.setdefault(there.st_ino, path)
    return list(paths.values())


def _pairs_in(path: Path) -> set[tuple[int, int]]:
    """The veth ends in another netns, as the other side sees them: (its index, the index in there)."""
    found = set()
    try:
        for link in netns.links_in(path):
            found.add((link.get_attr("IFLA_LINK") or 0, link["index"]))
    except SandbatchError:
        pass  # it has just ended
    return found


def remove_link(name: str) -> None:
    """Remove one link of this netns, and with it its other end."""
    with IPRoute() as ipr:
        for index in ipr.link_lookup(ifname=name):
            ipr.link("del", index=index)


def unmount_below(folder: Path, container_id: str) -> None:
    """Unmount what is mounted in a sandbox's own folder, or below ours with its id in the path.

    Raises:
        SandbatchError: It is in use.
    """
    points = []
    for point in (one.point for one in mounts_of(os.getpid())):
        if folder in point.parents and any(container_id in part for part in point.relative_to(folder).parts):
            points.append(point)
    libc = ctypes.CDLL(None, use_errno=True)
    for point in reversed(points):  # the last is the uppermost
        if libc.umount2(os.fsencode(point), UMOUNT_NOFOLLOW):
            words = os.strerror(ctypes.get_errno())
            raise SandbatchError(f"mount {point}", words, "see who uses it: fuser -m")
