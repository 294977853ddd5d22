"""Install what this host lacks, from Debian's archive, and write our own network."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from worker import process
from worker.doctor import NEWER, OPTIONAL, PLUGINS, POLICY_PACKAGE, PROGRAMS, policy_file
from worker.errors import HostNotReady, SandbatchError
from worker.probe_runsc import probe
from worker.runsc import find_binary
from worker.settings import Settings
from worker.subnet import ensure_network, lacks_ports

APT_TIMEOUT_S = 900
SUITE = "trixie"  # Debian 13: Debian 12's own runsc has no systrap, and sid's panics (DESIGN, point 7)
SOURCE = Path("/etc/apt/sources.list.d/sandbatch-runsc.list")
PREFERENCES = Path("/etc/apt/preferences.d/sandbatch-runsc")
PIN = f"""Package: *
Pin: release n={SUITE}
Pin-Priority: -10

Package: runsc
Pin: release n={SUITE}
Pin-Priority: 600
"""

Say = Callable[[str], None]


def setup(settings: Settings, say: Say, *, dry_run: bool = False) -> bool:
    """Make this machine a host; True if something was (or, dry, would be) done.

    Raises:
        HostNotReady: It is no Debian, or not root.
        SandbatchError: apt's own words.
    """
    packages = missing_packages(settings)
    needs_runsc = not _has_good_runsc(settings, bool(packages))
    done = bool(packages) or needs_runsc
    if done and not dry_run and os.geteuid() != 0:
        raise HostNotReady("setup", "root is needed to install packages", "run it as root")
    if packages:
        say(f"installing {' '.join(packages)}")
        if not dry_run:
            _apt("update")
            _apt("install", "-y", "--no-install-recommends", *packages)
        needs_runsc = needs_runsc and (dry_run or not _has_good_runsc(settings, False))
    if needs_runsc:
        say(f"installing runsc from Debian's {SUITE}")
        if not dry_run:
            _install_runsc()
            _judge(settings)
    if not dry_run:
        found = probe(settings)
        if found.is_old:
            say(f"runsc {found.version}: only the worker's read-only mounts hold its binds; {NEWER}")
        say(f"network {settings.network}: {ensure_network(settings)}")
        if lacks_ports(settings):
            say("it publishes no ports yet: run setup again while no sandbox is on it")
    return done


def missing_packages(settings: Settings) -> list[str]:
    """Debian packages of the programs and CNI plugins that are not there."""
    packages = [
        package for program, package in (PROGRAMS | OPTIONAL).items() if shutil.which(program) is None
    ]
    if any(not any((folder / name).is_file() for folder in settings.cni_paths) for name in PLUGINS):
        packages.append("containernetworking-plugins")
    if policy_file() is None:
        packages.append(POLICY_PACKAGE)
    return list(dict.fromkeys(packages))


def _has_good_runsc(settings: Settings, lacks_others: bool) -> bool:
    try:
        find_binary(settings)
        return False if lacks_others and shutil.which("conmon") is None else probe(settings).ok
    except HostNotReady:
        return False


def _install_runsc() -> None:
    if _codename() != SUITE:
        PREFERENCES.parent.mkdir(parents=True, exist_ok=True)
        PREFERENCES.write_text(PIN)  # before the source: no other package may ever come from it
        SOURCE.write_text(f"deb {_mirror()} {SUITE} main\n")
    _apt("update")
    _apt("install", "-y", "--no-install-recommends", "runsc")


def _judge(settings: Settings) -> None:
    found = probe(settings)
    if not found.ok:
        raise HostNotReady("runsc", found.error, "take a release of gVisor's: see the README")


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return ""


def _mirror() -> str:
    """Where this machine's own Debian packages come from, so that a mirror or a proxy is kept."""
    done = process.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(CODENAME) $(COMPONENT)",
            "Created-By: Packages",
        ],
        timeout_s=60,
    )
    codename = _codename()
    for line in done.stdout.splitlines():
        uri, _, rest = line.partition(" ")
        if rest == f"{codename} main":
            return uri
    raise HostNotReady(
        "setup", f"apt knows no source of Debian {codename}", "install runsc by hand: see the README"
    )


def _apt(*args: str) -> None:
    if shutil.which("apt-get") is None:
        raise HostNotReady("setup", "there is no apt-get here", "install by hand what sandbatch doctor names")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    argv = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", *args]
    done = process.run(argv, timeout_s=APT_TIMEOUT_S, env=env)
    if done.returncode:
        words = process.last_words(done.stderr) or process.last_words(done.stdout)
        raise SandbatchError(f"apt-get {args[0]}", words, "see apt's sources and the network")
