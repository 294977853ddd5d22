"""The host compared with its journals: every object that should not be there, or that is missing."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from worker import (
    attachments,
    cni_cache,
    egress_audit,
    image_audit,
    journal,
    limits,
    logs,
    loopback,
    mounted,
    netns,
    nft,
    ports,
    process,
    procs,
)
from worker.attachments import Attached
from worker.capabilities import PORT_MAPPINGS
from worker.cni_config import Network, list_networks, network_from_bytes
from worker.errors import BadNetwork, SandbatchError
from worker.journal import Journal
from worker.overlay import FOLDER
from worker.settings import Settings
from worker.spec import CONTAINER_ID
from worker.subnet import LIBCNI_DIR, NAME

ID_PART = re.compile(r"(?<![0-9a-zA-Z])sb-[0-9a-f]{16}(?![0-9a-zA-Z])")
# As utils.FormatChainName has them; DN: portmap's. Its shared CNI-HOSTPORT-… stay, by its design.
CHAIN = re.compile(r"^:(CNI-(?:DN-[0-9a-f]{21}|[0-9a-f]{24})) ", re.MULTILINE)
OUR_VETH = re.compile(r"^veth[0-9a-f]{8}$")  # as the bridge plugin names the host's end
OUR_IFB = re.compile(r"^bwp[0-9a-f]{12}$")  # as the bandwidth plugin names the link that slows what goes out
LOOPBACK = "published ports leave the host's loopback open to sandboxes; audit --mend loads it again"
UNREADABLE = "audit --mend undoes what the sandbox holds, and keeps the file"
LOG_LATE_S = 300.0  # a worker looks at the kept logs every `reconcile_s`
END_NOTED_S = 20.0  # an end that no event has told is found by the next look at the journals
MASQUERADE_TABLE = "cni_plugins_masquerade"  # of plugins that work through nftables


@dataclass(frozen=True, order=True)
class Finding:
    """One object: `problem` is "extra", "missing", "stuck", "unreadable", "writable" or "changed".

    Of `audit --deep` also what is no fault: "expected" and "skipped".
    """

    kind: str
    name: str
    problem: str
    container_id: str
    detail: str

    @property
    def is_bad(self) -> bool:
        return self.problem not in ("expected", "skipped")


@dataclass
class _Look:
    """What the journals say should and may be there."""

    settings: Settings
    journals: dict[str, Journal]
    networks: dict[str, Network]
    findings: set[Finding] = field(default_factory=set)

    def is_due(self, container_id: str, stage: str) -> bool:
        """The stage's objects must be there."""
        known = self.journals.get(container_id)
        return known is not None and not known.is_unwinding and not known.is_stale and known.is_done(stage)

    def may_hold(self, container_id: str, stage: str) -> bool:
        known = self.journals.get(container_id)
        return known is not None and stage in known.begun

    def compare(
        self, kind: str, stage: str, found: dict[str, str], due: dict[str, str] | None = None
    ) -> None:
        """`found` and `due`: name of an object -> id of its sandbox; without `due` nothing is missing."""
        for name, container_id in found.items():
            if not self.may_hold(container_id, stage):
                self._add(kind, name, "extra", container_id, "no journal has it")
        for name, container_id in (due or {}).items():
            if name not in found and self.is_due(container_id, stage):
                self._add(kind, name, "missing", container_id, "its journal says it is there")

    def _add(self, kind: str, name: str, problem: str, container_id: str, detail: str) -> None:
        self.findings.add(Finding(kind, name, problem, container_id, detail))


def audit(settings: Settings) -> list[Finding]:
    """Compare this host with its journals; an empty list means clean. Needs root; changes nothing.

    What a second look no longer finds was under way, not left behind.
    """
    found = _look(settings)
    return sorted(found & _look(settings)) if found else []


def _look(settings: Settings) -> set[Finding]:
    journals, errors = journal.read_all(settings.sandboxes_dir)
    networks = list_networks((settings.own_cni_conf_dir, settings.cni_conf_dir))[0]
    look = _Look(settings, {known.container_id: known for known in journals}, networks)
    for error in errors:
        if Path(error.what).name != journal.FILE:
            continue  # a folder without a journal: see _files
        container_id = Path(error.what.removesuffix(f"/{journal.FILE}")).name
        look._add("journal", error.what, "unreadable", container_id, f"{error.why}; {UNREADABLE}")
    for known in journals:
        stuck = known.facts.get("stuck")
        if stuck and not known.final:
            look._add(
                "sandbox",
                known.container_id,
                "stuck",
                known.container_id,
                f"{stuck['stage']}: {stuck['message']}",
            )
    done = {known.container_id: known for known in journals}
    look.compare("netns", "netns", _netns(), {one: one for one in done})
    _network_objects(look, done)
    _egress(look)
    _files(look, done)
    _processes(look)
    _mounts_and_cgroups(look)
    for name, problem, container_id, detail in image_audit.look(settings, journals):
        look._add("image", name, problem, container_id, detail)
    return look.findings


def _netns() -> dict[str, str]:
    return {name: name for name in netns.list_netns() if CONTAINER_ID.fullmatch(name)}


def _network_objects(look: _Look, done: dict[str, Journal]) -> None:
    settings = look.settings
    entries = [
        one
        for one in cni_cache.list_entries(settings.cni_cache_dir)
        if CONTAINER_ID.fullmatch(one.container_id)
    ]
    for entry in entries:
        try:
            look.networks.setdefault(entry.network, network_from_bytes(entry.config))
        except BadNetwork:
            continue  # the entry itself is compared below
    links = {one: found for one, known in done.items() if (found := attachments.attached(known))}
    due_entries = {
        cni_cache.entry_path(settings.cni_cache_dir, one.network, owner, one.if_name).name: owner
        for owner, one in _each(links)
    }
    look.compare("cni cache", "network", {one.path.name: one.container_id for one in entries}, due_entries)
    look.compare("cni cache", "network", half_written(look.settings))
    due_leases: dict[str, str] = {}
    for container_id, one in _each(links):
        folder = lease_folder(look.networks.get(one.network), settings)
        if folder is not None:
            due_leases |= {str(folder / ip): container_id for ip in one.ips}
    look.compare("lease", "network", _leases(look), due_leases)
    _links(look, links)
    _chains(look, links)
    due_ports = {
        path: container_id
        for container_id in links
        for path in ports.reservations(settings, done[container_id].facts.get("publish", []))
    }
    look.compare("port", "network", ports.reserved(settings), due_ports)


def _each(links: dict[str, list[Attached]]) -> Iterator[tuple[str, Attached]]:
    return ((container_id, one) for container_id, found in links.items() for one in found)


def lease_folder(network: Network | None, settings: Settings) -> Path | None:
    """Where host-local keeps the leases of a network; None if it uses another IPAM plugin."""
    if network is None:
        return None
    for plugin in network.plugins:
        ipam = plugin.get("ipam")
        if isinstance(ipam, dict) and ipam.get("type") == "host-local":
            return Path(ipam.get("dataDir") or LIBCNI_DIR / "networks") / network.name
    return None


def half_written(settings: Settings) -> dict[str, str]:
    """Cache entries of our ids that no DEL will read: torn ones, and those that a killed writer left
    beside the cache."""
    folder, found = settings.cni_cache_dir, {}
    for name in os.listdir(folder) if folder.is_dir() else []:
        if name[0] == "." and ID_PART.search(name):
            found[name] = ID_PART.findall(name)[0]
    results = folder / "results"
    for name in os.listdir(results) if results.is_dir() else []:
        if ID_PART.search(name) and cni_cache.read(results / name) is None and (results / name).exists():
            found[name] = ID_PART.findall(name)[0]
    return found


def _leases(look: _Look) -> dict[str, str]:
    """Leases of our ids everywhere, and all leases of our own network."""
    folders = {lease_folder(network, look.settings): network.name for network in look.networks.values()}
    found = {}
    for folder, name in folders.items():
        if folder is None or not folder.is_dir():
            continue
        for file in folder.iterdir():
            if file.name == "lock" or file.name.startswith("last_reserved_ip"):
                continue
            try:
                owner = file.read_text(errors="replace").split("\n")[0].strip()
            except OSError:
                continue  # freed just now, or no lease
            if CONTAINER_ID.fullmatch(owner) or name == NAME:
                found[str(file)] = owner
    return found


def _links(look: _Look, attached: dict[str, list[Attached]]) -> None:
    """The host's ends of the sandboxes' links, and what the bandwidth plugin sets beside them."""
    bridges = _bridges(look, attached)
    others = _links_of_others(look)
    with IPRoute() as ipr:
        links = list(ipr.get_links())
    names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in links}
    due: dict[str, dict[str, str]] = {"veth": {}, "ifb": {}}
    for container_id, one in _each(attached):
        due["veth"] |= dict.fromkeys(_host_links(one.result, OUR_VETH), container_id)
        due["ifb"] |= dict.fromkeys(_host_links(one.result, OUR_IFB), container_id)
    owners = {ifb_name(*pair): pair[1] for pair in _pairs(look)}
    found: dict[str, dict[str, str]] = {"veth": {}, "ifb": {}}
    for link in links:
        info, name = link.get_attr("IFLA_LINKINFO"), names[link["index"]]
        kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
        master = names.get(link.get_attr("IFLA_MASTER") or 0)
        if name in others:
            continue
        if kind == "veth":
            if name in due[kind] or master in bridges or (master is None and OUR_VETH.match(name)):
                found[kind][name] = due[kind].get(name, "")
        elif kind == "ifb" and OUR_IFB.match(name):
            found[kind][name] = owners.get(name, "")
    for kind, some in found.items():
        if _has_attaching(look):  # an ADD at work has no result yet
            some = {name: owner for name, owner in some.items() if name in due[kind]}
        look.compare(kind, "network", some, due[kind])


def _pairs(look: _Look) -> list[tuple[str, str]]:
    """(network, id) of which the plugins make names: all that the journals speak of."""
    return [(one.name, known.container_id) for known in look.journals.values() for one in known.spec.networks]


def _has_attaching(look: _Look) -> bool:
    return any("network" in known.begun and "network" not in known.data for known in look.journals.values())


def _bridges(look: _Look, attached: dict[str, list[Attached]]) -> set[str]:
    """Bridges of our own network and of those that our sandboxes are on."""
    names = {NAME, *(one.network for _, one in _each(attached))}
    plugins = [plugin for name in names if name in look.networks for plugin in look.networks[name].plugins]
    return {str(plugin.get("bridge", "cni0")) for plugin in plugins if plugin["type"] == "bridge"}


def _links_of_others(look: _Look) -> set[str]:
    """Links that another runtime's cache entry has: it may share a network with us."""
    entries = cni_cache.list_entries(look.settings.cni_cache_dir)
    strangers = [one.result or {} for one in entries if not CONTAINER_ID.fullmatch(one.container_id)]
    return {
        name for result in strangers for kind in (OUR_VETH, OUR_IFB) for name in _host_links(result, kind)
    }


def _host_links(result: dict[str, Any], kind: re.Pattern[str]) -> list[str]:
    names = [str(one.get("name")) for one in result.get("interfaces") or [] if not one.get("sandbox")]
    return [name for name in names if kind.match(name)]


def ifb_name(network: str, container_id: str) -> str:
    """The bandwidth plugin's own link for one attachment (its main.go, getIfbDeviceName)."""
    return "bwp" + hashlib.sha512((network + container_id).encode()).hexdigest()[:12]


def chain_name(network: str, container_id: str, prefix: str = "") -> str:
    """A nat chain of one attachment (plugins: pkg/utils/utils.go); with the prefix "DN-" portmap's."""
    return f"CNI-{prefix}{hashlib.sha512((network + container_id).encode()).hexdigest()}"[:28]


def chain_names(network: str, container_id: str) -> list[str]:
    return [chain_name(network, container_id, prefix) for prefix in ("", "DN-")]


def _chains(look: _Look, attached: dict[str, list[Attached]]) -> None:
    owners = {chain: pair[1] for pair in _pairs(look) for chain in chain_names(*pair)}
    found: dict[str, str] = {}
    for program in nat_programs():
        text = output(f"{program}-save", "-t", "nat")
        for chain in CHAIN.findall(text):
            rules = [line for line in text.splitlines() if chain in line and not line.startswith(":")]
            ids = ID_PART.findall("\n".join(rules))
            if chain in owners or ids or f'name: \\"{NAME}\\"' in "\n".join(rules) or not rules:
                found[chain] = owners.get(chain) or (ids[0] if ids else "")
    due = {}
    for container_id, one in _each(attached) if nat_programs() else ():
        network = look.networks.get(one.network)
        masquerade, forward = chain_names(one.network, container_id)
        if network and _masquerades_by_iptables(network):
            due[masquerade] = container_id
        if _publishes_by_iptables(look.journals[container_id], one.if_name):
            due[forward] = container_id
    look.compare("nat chain", "network", found, due)
    if shutil.which("nft") and MASQUERADE_TABLE in output("nft", "list", "tables"):
        text = output("nft", "list", "table", "inet", MASQUERADE_TABLE)
        rules_of = {f"{MASQUERADE_TABLE} {one}": one for one in ID_PART.findall(text)}
        look.compare("nft rule", "network", rules_of)


def _egress(look: _Look) -> None:
    """A sandbox that runs without its policy is as bad as a rule that is left over."""
    held = nft.held() if nft.is_here() else None
    look.compare("egress", "egress", egress_audit.loaded(held) if held is not None else {})
    due = [known for one, known in look.journals.items() if look.is_due(one, "egress")]
    for container_id, why in egress_audit.missing(due, held).items():
        look._add("egress", f"policy of {container_id}", "missing", container_id, why)
    if held is not None and loopback.is_open(look.settings):
        look._add("egress", f"table {loopback.FAMILY} {loopback.TABLE}", "missing", "", LOOPBACK)


def nat_programs() -> list[str]:
    """iptables, and that of IPv6 where the kernel has it."""
    programs = ["iptables", *(["ip6tables"] if Path("/proc/net/if_inet6").exists() else [])]
    return [one for one in programs if shutil.which(f"{one}-save")]


def _masquerades_by_iptables(network: Network) -> bool:
    bridges = [plugin for plugin in network.plugins if plugin["type"] == "bridge"]
    return any(one.get("ipMasq") and one.get("ipMasqBackend", "iptables") == "iptables" for one in bridges)


def _publishes_by_iptables(known: Journal, if_name: str) -> bool:
    """portmap has made its chain for this link, as its ADD was configured."""
    try:
        plans = [one for one in attachments.planned(known) if one.attachment.if_name == if_name]
    except BadNetwork:
        return False
    return any(
        plugin["type"] == "portmap" and plugin.get("backend", "iptables") == "iptables"
        for one in plans
        if PORT_MAPPINGS in one.attachment.capability_args
        for plugin in one.network.plugins
    )


def _files(look: _Look, done: dict[str, Journal]) -> None:
    settings = look.settings
    for folder in sorted(settings.sandboxes_dir.iterdir()) if settings.sandboxes_dir.is_dir() else []:
        if folder.name in look.journals or os.path.lexists(folder / journal.FILE):
            continue
        aside = journal.set_aside_files(folder)
        for file in aside:
            kind = file.name.removeprefix(f"{journal.FILE}.").rpartition("-")[0]
            look._add("journal", str(file), "unreadable", folder.name, f"set aside: {kind}; {UNREADABLE}")
        if not aside:
            look._add("folder", str(folder), "extra", folder.name, "it has no journal")
    for kept in logs.kept_logs(settings):
        late_s = time.time() - kept.until
        if late_s > LOG_LATE_S:
            words = f"it was to go {late_s / 60:.0f} minutes ago; a worker removes it, or --mend"
            look._add("log", str(kept.path), "extra", kept.container_id, words)
    configs = {str(known.bundle / "config.json"): one for one, known in done.items()}
    look.compare(
        "bundle", "bundle", {one: owner for one, owner in configs.items() if Path(one).exists()}, configs
    )
    folders = {str(folder): folder.parts[-3] for folder in settings.sandboxes_dir.glob(f"*/bundle/{FOLDER}")}
    look.compare("overlay", "bundle", folders)
    places = (
        ("runsc state", settings.runsc_root),
        ("exit file", settings.exit_dir),
        ("exec file", settings.execs_dir),
    )
    for kind, place in places:
        found = {}
        for name in os.listdir(place) if place.is_dir() else []:
            ids = ID_PART.findall(name)
            if ids:
                found[str(place / name)] = ids[0]
        look.compare(kind, "container", found)


def _processes(look: _Look) -> None:
    found = procs.all_sandbox_processes(look.settings.runsc_root)
    look.compare("process", "container", {f"{one.role} {one.pid}": one.container_id for one in found})
    alive = {(one.container_id, one.role) for one in found}
    for container_id, known in look.journals.items():
        if not known.is_up or _has_just_ended(look.settings, container_id):
            continue
        for role in ("conmon", "sandbox", "gofer"):
            if (container_id, role) not in alive:
                look._add("process", f"{role} of {container_id}", "missing", container_id, "it has ended")
    _given(look, [one for one in found if one.role == "gofer" and look.is_due(one.container_id, "container")])


def _given(look: _Look, gofers: Iterable[procs.Proc]) -> None:
    """What a sandbox is given of the host is read-only on the host's side, also after its start."""
    for gofer in gofers:
        try:
            lines = mounted.mounts_of(gofer.pid)
        except OSError:
            continue  # it has just ended
        for line in lines:
            if line.lacking:
                problem = "writable" if "ro" in line.lacking else "changed"
                name = f"{line.point} of gofer {gofer.pid}"
                words = f"{line.root} of the host is mounted without {', '.join(line.lacking)}"
                look._add("mount", name, problem, gofer.container_id, words)


def _has_just_ended(settings: Settings, container_id: str) -> bool:
    """conmon has written its exit code, and the worker has not yet had the time to note that."""
    try:
        return time.time() - (settings.exit_dir / container_id).stat().st_mtime < END_NOTED_S
    except FileNotFoundError:
        return False


def _mounts_and_cgroups(look: _Look) -> None:
    mounts, netns_dir = {}, netns.NETNS_DIR.resolve()
    for line in mounted.mounts_of(os.getpid()):
        ids = ID_PART.findall(str(line.point))
        if ids and line.point.parent != netns_dir:
            mounts[str(line.point)] = ids[0]
    look.compare("mount", "container", mounts)
    # Only below our own parents: another sandbatch of this machine has other ones.
    parents = {look.settings.cgroup_parent}
    for container_id, known in look.journals.items():
        cgroup = limits.made_cgroup(known.data.get("bundle", {}), container_id)
        parents |= {Path(cgroup).parent.name} if cgroup else set()
    found = {str(folder): folder.name for folder in limits.list_cgroups(sorted(parents))}
    look.compare("cgroup", "container", {one: name for one, name in found.items() if ID_PART.search(name)})


def output(*argv: str) -> str:
    """What a program of the host prints.

    Raises:
        SandbatchError: Its last words.
    """
    done = process.run(argv, timeout_s=30)
    if done.returncode:
        raise SandbatchError(
            argv[0], process.last_words(done.stderr) or "failed", "run as root; see sandbatch doctor"
        )
    return done.stdout
