"""Remove what is ours and provably dead, and nothing else: `sandbatch audit --mend`.

The proof, for each id that the audit finds: it has our pattern; no journal here speaks of it, as
looked up under the lock that any stage of it would need; no other sandbatch of this machine has it,
and nobody else lives in its netns. Its processes are those below our runsc root, ended by pid and
start time (`procs.PidFds`). Whatever lacks this proof is left, and the outcome says why.
"""

import contextlib
import fcntl
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worker import bundle as oci
from worker import (
    cni_cache,
    conmon,
    egress,
    image_audit,
    journal,
    leftovers,
    limits,
    logs,
    loopback,
    netns,
    nft,
    ports,
    procs,
)
from worker.audit import ID_PART, Finding, audit, chain_names, half_written, ifb_name, lease_folder
from worker.cni import Attachment, CniRuntime
from worker.cni_cache import CacheEntry
from worker.cni_config import Network, list_networks, network_from_bytes
from worker.errors import BadNetwork, Busy, JournalError, SandbatchError
from worker.exec import left_over
from worker.journal import Journal, now
from worker.launch import undo_all
from worker.runsc import Runsc
from worker.settings import DEFAULT_CONFIG, Settings
from worker.spec import CONTAINER_ID
from worker.stages import make_host
from worker.subnet import NAME

FAREWELL_S = 5.0  # a killed process is gone within this time
HAS_JOURNAL = "its sandbox has a journal here: the worker undoes it, see sandbatch rm"
WORKER_GOES_ON = "the worker goes on trying; it says why"
MISSING = "nothing brings it back: sandbatch rm undoes the rest of its sandbox"
WRITABLE = "what has gone through it is not known: sandbatch rm ends its sandbox"
NO_PROOF = "nothing proves whose it is: remove it by hand, or leave it"
# What else than bundle and log a killed `create`, or a log of conmon's, leaves in a sandbox's folder.
OUR_FILES = ("container.log", f".{journal.FILE}.")


@dataclass(frozen=True)
class Outcome:
    """One finding; `why` says why it is still there, or what it was."""

    finding: Finding
    mended: bool
    why: str


def mend(settings: Settings) -> list[Outcome]:
    """Remove what the audit finds and the proof allows; then audit again. Needs root.

    Mended is what the second audit does not find any more. Safe to repeat, beside a worker too.
    """
    reasons = _finish_undos(settings)
    before = audit(settings)
    logs.prune(settings, time.time())
    work = _Work(settings)
    orphans = {
        one.container_id for one in before if one.problem in ("extra", "unreadable") and one.kind != "log"
    }
    for container_id in sorted(filter(CONTAINER_ID.fullmatch, orphans)):
        reasons[container_id] = work.mend_one(container_id)
    if any(one.kind == "egress" for one in before):
        reasons |= _load_policies(settings, {one.container_id for one in before if _is_open(one)} - {""})
        if nft.is_here() and loopback.is_open(settings):
            loopback.close()
        if nft.is_here():
            nft.drop_empty_tables()
    veths = {one.name for one in before if one.kind == "veth" and one.problem == "extra"}
    reasons |= work.remove_links(veths) if veths else {}
    reasons |= image_audit.put_right(settings)
    return _outcomes(before, audit(settings), reasons)


def _outcomes(before: list[Finding], after: list[Finding], reasons: dict[str, str]) -> list[Outcome]:
    left = {_key(one): one for one in after}
    gone = [Outcome(one, True, one.detail) for one in before if _key(one) not in left]
    return gone + [Outcome(one, False, _reason(one, reasons)) for one in after]


def _key(finding: Finding) -> tuple[str, str, str]:
    """A journal gets another name when it is set aside."""
    return finding.kind, finding.container_id if finding.kind == "journal" else finding.name, finding.problem


def _reason(finding: Finding, reasons: dict[str, str]) -> str:
    known = reasons.get(finding.name) or reasons.get(finding.container_id)
    if finding.problem == "missing":
        return (known if _is_open(finding) else None) or MISSING
    if finding.kind == "mount" and finding.problem != "extra":
        return WRITABLE
    if finding.problem == "stuck":
        return known or WORKER_GOES_ON
    return known or NO_PROOF


# -- what has a journal ----------------------------------------------------------------------------


def _finish_undos(settings: Settings) -> dict[str, str]:
    """Run the undos that are due, if no worker does; returns why some stay due, by id."""
    due = [
        known
        for known in journal.read_all(settings.sandboxes_dir)[0]
        if known.is_unwinding and not known.final
    ]
    if not due:
        return {}
    with _in_place_of_the_worker(settings) as is_alone:
        if not is_alone:
            return {}
        try:
            host = make_host(settings, hides_sysctl=False)  # which only a start needs
        except SandbatchError as error:
            return {known.container_id: str(error) for known in due}
        reasons = {}
        for known in due:
            try:
                with journal.locked(settings.sandboxes_dir, known.container_id) as current:
                    if current.is_unwinding and not current.final:
                        undo_all(host, current)
                        current.set_facts(ended_at=now())
            except JournalError:
                continue  # it has just ended, or is an orphan's now
            except (SandbatchError, OSError) as error:
                reasons[known.container_id] = str(error)
        return reasons


def _is_open(finding: Finding) -> bool:
    """Rules of ours that somebody took away: the one thing missing that can be brought back."""
    return finding.kind == "egress" and finding.problem == "missing"


def _load_policies(settings: Settings, container_ids: set[str]) -> dict[str, str]:
    """Load again what somebody has taken away; returns why a policy cannot be loaded, by id."""
    reasons = {}
    for container_id in sorted(container_ids):
        try:
            with journal.locked(settings.sandboxes_dir, container_id) as known:
                if known.is_done("egress") and not known.is_unwinding:
                    egress.load(known)
        except (SandbatchError, OSError) as error:
            reasons[container_id] = str(error)
    return reasons


@contextlib.contextmanager
def _in_place_of_the_worker(settings: Settings) -> Iterator[bool]:
    """Hold the host's lock, so that no worker begins meanwhile; False if one has it."""
    settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(settings.run_dir / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


# -- what has none ---------------------------------------------------------------------------------


class _Work:
    """One run: the networks and the other sandbatches of this machine are looked up once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cni = CniRuntime.from_settings(settings)
        self.networks = list_networks((settings.own_cni_conf_dir, settings.cni_conf_dir))[0]
        self.own_bridges = _bridges(list_networks((settings.own_cni_conf_dir,))[0].get(NAME))
        for entry in cni_cache.list_entries(settings.cni_cache_dir):
            with contextlib.suppress(BadNetwork):
                self.networks.setdefault(entry.network, network_from_bytes(entry.config))
        # After the audit's look: who makes an object journals it first, so its journal is here by now.
        self.others = others(settings)

    def mend_one(self, container_id: str) -> str:
        """Undo what an id without a journal holds; returns why something stays, empty if nothing does."""
        if container_id in self.others:
            return self.others[container_id]
        sandboxes = self.settings.sandboxes_dir
        try:
            # Its folder has its lock: while we hold it, no launch of this id can begin a stage.
            (sandboxes / container_id).mkdir(mode=0o700, parents=True, exist_ok=True)
            with journal.held(sandboxes, container_id) as folder:
                try:
                    journal.set_aside(folder)
                    known = _journal_in(folder)
                    if known is not None and not known.final:
                        return HAS_JOURNAL
                    self._undo(container_id, folder)
                    return self._remove_folder(folder) if known is None else ""
                finally:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # if it is the one that was made for the lock
        except Busy:
            return "somebody works on it at the moment"
        except (SandbatchError, OSError) as error:
            return str(error)

    def _undo(self, container_id: str, folder: Path) -> None:
        """The undos of a sandbox, last stage first, by its id alone; stops at the first that fails."""
        settings, path = self.settings, netns.netns_path(container_id)
        procs.end(procs.processes_of(settings.runsc_root, container_id), timeout_s=FAREWELL_S)
        for place in (settings.run_dir, settings.sandboxes_dir):
            leftovers.unmount_below(place, container_id)
        conmon.end_container(self._runsc(), container_id, folder / "bundle", settings.exit_dir)
        limits.remove_cgroups(limits.cgroup_path(settings.cgroup_parent, container_id))
        for file in left_over(settings):
            if file.name.startswith(f"{container_id}."):
                file.unlink(missing_ok=True)
        _remove_bundle(folder / "bundle")
        if path.is_symlink():
            path.unlink()  # never through it: it may lead to the netns of another
        if path.exists() and not netns.netns_exists(container_id) and (pid := _mounted_elsewhere(path)):
            words = f"as process {pid} sees it, there is a netns: it is in another mount namespace"
            raise SandbatchError(f"netns {container_id}", words, "mend from there")
        if strangers := inhabitants(path):
            words = f"process {strangers[0]} lives in it, and is none of the sandbox's"
            raise SandbatchError(f"netns {container_id}", words, "end it, then mend again")
        if nft.is_here():
            egress.remove_by_id(container_id)
        self._detach(container_id)
        netns.delete_netns(container_id)

    def _runsc(self) -> Runsc:
        """Nothing of it is run here: the host may have lost its binary."""
        one = self.settings
        return Runsc(
            Path("runsc"), one.runsc_root, "systrap", "sandbox", one.runsc_timeout_s, False, one.run_dir
        )

    def _detach(self, container_id: str) -> None:
        """CNI DEL as each cache entry has it; by hand what no entry speaks of."""
        cache_dir = self.settings.cni_cache_dir
        entries = cni_cache.list_entries(cache_dir)
        for entry in entries:
            if entry.container_id == container_id:
                detach_orphan(self.cni, entry, entries)
        folders = {lease_folder(network, self.settings) for network in self.networks.values()}
        leftovers.free_leases(container_id, sorted(filter(None, folders)))
        names = [chain for name in self.networks for chain in chain_names(name, container_id)]
        leftovers.remove_chains(container_id, set(names))
        for name in self.networks:
            leftovers.remove_link(ifb_name(name, container_id))
        ports.release(self.settings, container_id)
        for name, owner in half_written(self.settings).items():
            if owner == container_id:
                place = cache_dir if name.startswith(".") else cache_dir / "results"
                (place / name).unlink(missing_ok=True)

    def _remove_folder(self, folder: Path) -> str:
        """Remove the folder of an orphan; its journal that could not be read is kept for the operator."""
        for file in journal.set_aside_files(folder):
            kept = self.settings.state_dir / "set-aside"
            kept.mkdir(mode=0o700, exist_ok=True)
            file.rename(kept / f"{folder.name}.{file.name}")
        for one in folder.iterdir():
            if one.name.startswith(OUR_FILES) and not one.is_dir():
                one.unlink()
        strange = sorted(one.name for one in folder.iterdir())
        if strange:
            return f"{', '.join(strange)[:200]} in it is none of ours: see {folder}"
        folder.rmdir()
        return ""

    def remove_links(self, found: set[str]) -> dict[str, str]:
        """Links on our own network's bridge that no attachment has; returns why the others stay."""
        reasons = {}
        with self.cni._locked(fcntl.LOCK_EX):  # no ADD is under way, none begins
            again = {
                one.name for one in audit(self.settings) if one.kind == "veth" and one.problem == "extra"
            }
            strays = leftovers.stray_links(found & again, self.own_bridges)
            for name, other_end in strays.items():
                if other_end:
                    reasons[name] = f"its other end is in {other_end}"
                else:
                    leftovers.remove_link(name)
        for name in found - strays.keys():
            reasons[name] = f"it is not on the bridge of our own network, {NAME}: nothing proves whose it is"
        return reasons


def detach_orphan(cni: CniRuntime, entry: CacheEntry, entries: list[CacheEntry]) -> None:
    """CNI DEL of an attachment whose sandbox is dead, with the configuration and result of its ADD.

    An entry whose address is another attachment's by now is only forgotten: a plugin that goes by
    addresses would undo the other's rules. What host-local and the bridge plugin hold is freed by id.

    Raises:
        SandbatchError: A plugin's words, or the entry's configuration cannot be read.
    """
    others_here = [
        one for one in entries if one.network == entry.network and one.container_id != entry.container_id
    ]
    if any(_ips(one) & _ips(entry) for one in others_here):
        entry.path.unlink(missing_ok=True)
        return
    own, path = netns.netns_path(entry.container_id), Path(entry.netns)
    is_own = path.name == own.name and path.parent.resolve() == own.parent.resolve()
    attachment = Attachment(
        entry.container_id,
        own if is_own else Path(),  # another path may be the netns of another, which is not touched
        entry.if_name,
        entry.cni_args,
        entry.capability_args,
    )
    cni.cni_del(network_from_bytes(entry.config, where=f"CNI cache entry {entry.path}"), attachment)
    entry.path.unlink(missing_ok=True)  # under whatever name it was found


def _journal_in(folder: Path) -> Journal | None:
    """None where there is none."""
    try:
        return journal.read(folder)
    except JournalError:
        if os.path.lexists(folder / journal.FILE):
            raise
        return None


def _ips(entry: CacheEntry) -> set[str]:
    ips = (entry.result or {}).get("ips")
    found = [one.get("address") for one in ips if isinstance(one, dict)] if isinstance(ips, list) else []
    return {str(one).partition("/")[0] for one in found if one}


def _remove_bundle(bundle: Path) -> None:
    if bundle.is_symlink():
        bundle.unlink()
    else:
        oci.remove_bundle(bundle)


def _bridges(network: Network | None) -> set[str]:
    plugins = network.plugins if network is not None else ()
    return {str(plugin.get("bridge", "cni0")) for plugin in plugins if plugin["type"] == "bridge"}


# -- who else may have it --------------------------------------------------------------------------


def inhabitants(path: Path) -> list[int]:
    """Processes that live in a netns; none where there is no netns."""
    if not netns.netns_exists(path.name):
        return []
    there, found = path.stat(), []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), there):
                found.append(int(pid))
        except OSError:
            continue  # it has just ended
    return sorted(found)


def _mounted_elsewhere(path: Path) -> str:
    """A process that has a mount at this path in its mount namespace; empty if none has.

    A name without a netns looks half-made from a container that only shares the folder; to unlink
    it would take the netns from those who have it mounted.
    """
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        points = (line.split(" ")[4] for line in _read(f"/proc/{pid}/mountinfo").splitlines())
        if any(point.endswith(f"/netns/{path.name}") for point in points):
            return pid
    return ""


def others(settings: Settings) -> dict[str, str]:
    """Ids that another sandbatch of this machine has, and why we think so.

    Netns, links and rules are the whole machine's; one with other folders has the same pattern of
    ids. Its sandboxes are known by their processes, with another runsc root, and, before they have
    one, by the journals of its worker.
    """
    found: dict[str, str] = {}
    own_root = f"--root={settings.runsc_root}"
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        words = _read(f"/proc/{pid}/cmdline").split("\0")
        roots = {word.removeprefix("--runtime-arg=") for word in words}
        if own_root not in roots and any(root.startswith("--root=") for root in roots):
            ids = {one for word in words for one in ID_PART.findall(word)}
            found |= dict.fromkeys(ids, f"process {pid}, of another runsc root, has it")
        elif any(word == "worker" for word in words):
            place = _sandboxes_of(pid, settings)
            names = os.listdir(place) if place is not None and place.is_dir() else []
            found |= dict.fromkeys(filter(CONTAINER_ID.fullmatch, names), f"it is in {place}")
    return found


def _sandboxes_of(pid: str, settings: Settings) -> Path | None:
    """Where another sandbatch's worker has its journals; None for any other process, and for our own."""
    lock = settings.run_dir / "worker.lock"
    try:
        open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return None  # it has just ended
    if not any(name.endswith(f"/{lock.name}") and name != str(lock) for name in open_files):
        return None
    pairs = (line.partition("=") for line in _read(f"/proc/{pid}/environ").split("\0"))
    env = {name: value for name, _, value in pairs}
    text = env.get("SANDBATCH_STATE_DIR") or _state_dir_in(env.get("SANDBATCH_CONFIG") or str(DEFAULT_CONFIG))
    place = Path(text or str(Settings.model_fields["state_dir"].default)) / "sandboxes"
    return place if place.resolve() != settings.sandboxes_dir.resolve() else None


def _state_dir_in(config: str) -> str:
    try:
        return str(tomllib.loads(Path(config).read_text()).get("state_dir", ""))
    except (OSError, ValueError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError:
        return ""  # it has just ended
