"""What a host needs, one row for each thing: found, version, ok or the mend."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worker import limits, loopback, nft, process
from worker.cni import CniRuntime
from worker.cni_config import find_network
from worker.egress_rules import Link, load_text, ruleset
from worker.errors import BadNetwork, HostNotReady, SandbatchError
from worker.probe_runsc import HOLE, probe
from worker.runsc import MENDED, find_binary
from worker.settings import Settings
from worker.subnet import NAME, lacks_ports

SETUP = "sandbatch setup"
# Program -> Debian package. What our own code starts, on every launch.
PROGRAMS = {
    "conmon": "conmon",
    "tini": "tini",
    "iptables": "iptables",
    "setpriv": "util-linux",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
# What only some specs need: a host without it refuses these, and works for all others.
OPTIONAL = {"nft": "nftables", "skopeo": "skopeo", "umoci": "umoci"}
IMAGES = ("skopeo", "umoci")
# Without one skopeo copies nothing; its package brings it, but one of the two may have been taken by hand.
POLICY, POLICY_PACKAGE = "image policy", "golang-github-containers-common"
NEWER = f"take gVisor's {MENDED} or a later one, see runsc in the README"
PLUGINS = ("bridge", "host-local", "loopback")


SAMPLE_ID = "sb-0000000000000000"
SAMPLE_LINK = Link("eth0", "sbsample", "sbsample0", "02:00:00:00:00:01", ("192.0.2.2/24",), ("192.0.2.1/24",))


@dataclass(frozen=True)
class Row:
    """One thing: where it was found, its version, and what to do where it is not ok."""

    name: str
    found: str
    version: str
    ok: bool
    mend: str


def doctor(settings: Settings) -> list[Row]:
    """Look at everything that a host needs. Runs a sandbox with runsc, unless the same one passed before."""
    rows = [_root()]
    rows += [_program(name) for name in PROGRAMS]
    rows.append(_nft())
    rows += [*map(_image_program, IMAGES), _policy()]
    rows += list(_plugins(settings))
    rows += [_network(settings), _cgroups(), _runsc(settings)]
    return rows


def check_host(settings: Settings) -> None:
    """Refuse a host that lacks something.

    Raises:
        HostNotReady: The first thing that is lacking, as `doctor` says it.
    """
    for row in doctor(settings):
        if not row.ok and row.name not in (*OPTIONAL, POLICY):
            raise HostNotReady(row.name, row.found, row.mend)


def _root() -> Row:
    is_root = os.geteuid() == 0
    return Row("root", f"uid {os.geteuid()}", "", is_root, "" if is_root else "run as root")


def _program(name: str) -> Row:
    path = shutil.which(name)
    if path is None:
        return Row(name, "not on the PATH", "", False, f"{SETUP}, or apt-get install {PROGRAMS[name]}")
    done = process.run([path, "--version"], timeout_s=10)
    version = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
    return Row(name, path, version[0] if version else "", True, "")


def _nft() -> Row:
    """For --egress, --isolate and -p; judged by rules that the kernel is asked to take, and that stay out."""
    path = shutil.which("nft")
    if path is None:
        mend = f"for --egress, --isolate and -p: {SETUP}, or apt-get install {OPTIONAL['nft']}"
        return Row("nft", "not on the PATH", "", False, mend)
    version = re.search(r"\d+(?:\.\d+)+", process.run([path, "--version"], timeout_s=10).stdout)
    if os.geteuid() != 0:
        return Row("nft", path, "", False, "cannot be judged without root")
    words = nft.check(load_text(ruleset(SAMPLE_ID, (SAMPLE_LINK,), ["10.0.0.0/8:443"], True)) + loopback.TEXT)
    mend = "for --egress, --isolate and -p the kernel needs nf_tables for bridge and inet" if words else ""
    found = f"{path}: {words}" if words else path
    return Row("nft", found, version[0] if version else "", not words, mend)


def _image_program(name: str) -> Row:
    path = shutil.which(name)
    if path is None:
        mend = f"for --image: {SETUP}, or apt-get install {OPTIONAL[name]}"
        return Row(name, "not on the PATH", "", False, mend)
    version = re.search(r"\d+(?:\.\d+)+", process.run([path, "--version"], timeout_s=10).stdout)
    return Row(name, path, version[0] if version else "", True, "")


def policy_file() -> Path | None:
    """Which images skopeo accepts; None if there is no such file, and it accepts none."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    places = (config / "containers/policy.json", Path("/etc/containers/policy.json"))
    return next((one for one in places if one.is_file()), None)


def _policy() -> Row:
    file = policy_file()
    if file is None:
        mend = f"for --image: {SETUP}, or apt-get install {POLICY_PACKAGE}"
        return Row(POLICY, "no /etc/containers/policy.json", "", False, mend)
    return Row(POLICY, str(file), "", True, "")


def _plugins(settings: Settings) -> Iterator[Row]:
    cni = CniRuntime.from_settings(settings)
    for name in PLUGINS:
        path = next((folder / name for folder in settings.cni_paths if (folder / name).is_file()), None)
        if path is None:
            mend = f"{SETUP}, or apt-get install containernetworking-plugins"
            yield Row(f"CNI plugin {name}", f"not in {settings.cni_path}", "", False, mend)
            continue
        try:
            yield Row(
                f"CNI plugin {name}", str(path), "CNI " + ", ".join(cni.cni_version(name)[-3:]), True, ""
            )
        except (SandbatchError, ValueError) as error:
            yield Row(
                f"CNI plugin {name}", f"{path}: {error}", "", False, "reinstall containernetworking-plugins"
            )


def _network(settings: Settings) -> Row:
    name = f"network {settings.network}"
    try:
        network = find_network(settings.network, (settings.own_cni_conf_dir, settings.cni_conf_dir))
    except BadNetwork as error:
        return Row(name, error.why, "", False, f"{SETUP}; {error.todo}")
    missing = CniRuntime.from_settings(settings).missing_plugins(network)
    if missing:
        return Row(
            name, f"plugin {', '.join(missing)} not found", network.cni_version, False, "install the plugin"
        )
    hint = f"it publishes no ports: {SETUP} while no sandbox is on it" if _is_old(settings) else ""
    return Row(name, str(network.file or "found"), f"CNI {network.cni_version}", True, hint)


def _is_old(settings: Settings) -> bool:
    return settings.network == NAME and lacks_ports(settings)


def _cgroups() -> Row:
    """Never a reason not to start: a sandbox without limits needs none."""
    lacking = limits.lacking()
    found = ", ".join(sorted(limits.NEEDED_V2 & limits.controllers())) or "none"
    version = "v2" if limits.is_v2() else "v1"
    if lacking:
        mend = f"mount cgroups with {', '.join(lacking)} too: --memory and --cpus are refused"
        return Row("cgroups", found, version, True, mend)
    return Row("cgroups", found, version, True, "")


def _runsc(settings: Settings) -> Row:
    try:
        binary = find_binary(settings)
        if shutil.which("conmon") is None:
            return Row("runsc", str(binary), "", False, "cannot be judged without conmon")
        if os.geteuid() != 0:
            return Row("runsc", str(binary), "", False, "cannot be judged without root")
        found = probe(settings)
    except HostNotReady as error:
        return Row("runsc", error.why, "", False, error.todo)
    except SandbatchError as error:
        return Row("runsc", str(error), "", False, SETUP)
    if not found.ok:
        mend = NEWER if HOLE in found.error else f"{SETUP}, or a release of gVisor's"
        return Row("runsc", f"{binary}: {found.error}", found.version, False, mend)
    trick = ", with /proc/sys/net/core hidden" if found.hides_sysctl else ""
    hint = f"only the worker's read-only mounts hold its binds: {NEWER}" if found.is_old else ""
    return Row("runsc", str(binary) + trick, found.version, True, hint)
