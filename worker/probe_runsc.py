"""Judge this host's runsc by running a sandbox with it, not by its version: it runs, and it contains."""

import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from worker import bundle, conmon, netns
from worker.errors import NotContained, ProcessTimeout, RunscError, SandbatchError
from worker.locks import open_private
from worker.mounts import BIND_OPTIONS
from worker.runsc import Runsc, is_old
from worker.settings import Settings
from worker.spec import make_spec, new_container_id

ROOT_NETNS_WORDS = "cannot run with network enabled in root network namespace"
# Opens a file of a read-only bind with O_TRUNC: by itself an old runsc lets that through to the host.
BAIT, BAIT_TEXT, BAIT_TARGET = "bait", "as it was\n", "/var/www/html"
TRUNCATE = ["sh", "-c", f"(: > {BAIT_TARGET}/{BAIT}) 2>/dev/null; test -e {BAIT_TARGET}/{BAIT}"]
HOLE = "a sandbox could change a file of a read-only bind on the host"
FORMAT = 2  # of the cache: what an older probe did not try is not known
DYNAMIC_WORDS = "waiting for sandbox to start: EOF"
SIDECARS_SINCE = 202608  # since these releases runsc has a folder gvisor-bin/ beside it
PROBE_TIMEOUT_S = 20.0  # --platform=kvm hangs where there is no real KVM
# An address on the interface, as CNI leaves it: only then does runsc set a network up.
ADDRESS = {"interface": 0, "address": "198.18.0.2/30"}


@dataclass(frozen=True)
class RunscProbe:
    """What the probe found; `hides_sysctl` is the mount trick of `worker.runsc`."""

    ok: bool
    hides_sysctl: bool
    seconds: float
    error: str
    version: str

    @property
    def is_old(self) -> bool:
        """It mounts binds writable on the host's side: only the worker's read-only view holds them."""
        return is_old(self.version)


def probe(settings: Settings) -> RunscProbe:
    """Run a sandbox with this host's runsc, or remember how that went with the same file and kernel.

    Raises:
        HostNotReady: There is no runsc, or no conmon.
    """
    runsc = Runsc.from_settings(settings, hides_sysctl=False)
    key, cache = _key(runsc), settings.state_dir / "runsc-probe.json"
    known = _load(cache, key)
    if known is None:
        with _only_probe(settings):
            _sweep(runsc, settings)
            known = _probe(runsc, settings)
        if known.ok:  # a failure is looked at again: what it lacked may be there by now
            _save(cache, key, known)
    return known


def remembered(settings: Settings) -> RunscProbe | None:
    """What a probe of the same file and kernel found; None if none has run. Runs nothing.

    Raises:
        HostNotReady: There is no runsc.
    """
    key = _key(Runsc.from_settings(settings, hides_sysctl=False))
    return _load(settings.state_dir / "runsc-probe.json", key)


@contextmanager
def _only_probe(settings: Settings) -> Iterator[None]:
    settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(settings.run_dir / "probe.lock", "w", opener=open_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(runsc: Runsc, settings: Settings) -> None:
    """End what a probe that was killed has left; under the lock no other can be at work."""
    for folder in settings.run_dir.glob("probe-*"):
        for sandbox in folder.glob("sb-*"):
            _remove(replace(runsc, root=folder / "root"), sandbox.name, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _probe(runsc: Runsc, settings: Settings) -> RunscProbe:
    began = time.monotonic()
    version = runsc.version()
    hides_sysctl, error = False, _run_sandbox(runsc, settings)
    if ROOT_NETNS_WORDS in error:
        hides_sysctl, error = True, _run_sandbox(replace(runsc, hides_sysctl=True), settings)
    seconds = round(time.monotonic() - began, 3)
    if DYNAMIC_WORDS in error:
        error += "; it looks dynamically linked: build it with CGO_ENABLED=0, or take a release"
    lacking = _lacking_sidecars(runsc.binary, version)
    return RunscProbe(not error, hides_sysctl, seconds, error or lacking, version)


def _run_sandbox(runsc: Runsc, settings: Settings) -> str:
    """Run `TRUNCATE` in a sandbox with an address; the error's words, or nothing. Leaves nothing behind."""
    container_id = new_container_id()
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=settings.run_dir))
    runsc = replace(
        runsc, root=folder / "root", run_dir=folder, timeout_s=min(runsc.timeout_s, PROBE_TIMEOUT_S)
    )
    own = settings.model_copy(update={"run_dir": folder})  # exit files: not among those of real sandboxes
    bundle_dir = folder / container_id / "bundle"
    bundle_dir.mkdir(parents=True)  # first of all: by its name a later probe knows what to sweep
    bait = folder / BAIT / BAIT
    bait.parent.mkdir()
    bait.write_text(BAIT_TEXT)
    try:
        netns_path = _make_netns(container_id)
        config = bundle.make_config(make_spec(args=TRUNCATE), container_id, netns_path, settings)
        bind = {"destination": BAIT_TARGET, "type": "bind", "source": str(bait.parent)}
        config["mounts"].append({**bind, "options": list(BIND_OPTIONS)})
        bundle.write_bundle(bundle_dir, config)
        log_path = folder / container_id / "log"
        conmon.create(runsc, own, container_id, bundle_dir, log_path, netns_path)
        runsc.start(container_id, netns_path)
        if not conmon.wait_for_exit(runsc, container_id, runsc.timeout_s):
            return f"`sh` did not end within {runsc.timeout_s:g} s"
        code = conmon.exit_code(own.exit_dir, container_id)
        if bait.read_text() != BAIT_TEXT:
            return HOLE
        return "" if code == 0 else f"`sh` ended with code {code}: {conmon.tail_log(log_path)}"
    except NotContained as error:
        return f"{HOLE}: {error}"
    except (RunscError, ProcessTimeout) as error:
        return error.why
    finally:
        _remove(runsc, container_id, folder)


def _remove(runsc: Runsc, container_id: str, folder: Path) -> None:
    conmon.end_container(runsc, container_id, folder / container_id / "bundle", folder / "exits")
    netns.delete_netns(container_id)
    shutil.rmtree(folder)


def _make_netns(container_id: str) -> Path:
    netns.create_netns(container_id)
    path = netns.netns_path(container_id)
    interface = {"name": "eth0", "sandbox": str(path)}
    netns.put_world_back(path, "eth0", {"cniVersion": "1.0.0", "interfaces": [interface], "ips": [ADDRESS]})
    return path


def _lacking_sidecars(binary: Path, version: str) -> str:
    release = re.match(r"release-(\d{6})", version)
    if not release or int(release[1]) < SIDECARS_SINCE:
        return ""
    folder = binary.resolve().parent / "gvisor-bin"
    return "" if folder.is_dir() else f"{folder} is missing: install the release whole, runsc alone is slower"


def _key(runsc: Runsc) -> list[str | int]:
    found = runsc.binary.stat()
    file: list[str | int] = [FORMAT, str(runsc.binary), found.st_mtime_ns, found.st_size]
    return [*file, platform.release(), runsc.platform, runsc.network]


def _load(cache: Path, key: list[str | int]) -> RunscProbe | None:
    try:
        found = json.loads(cache.read_text())
        return RunscProbe(**found["probe"]) if found["key"] == key else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # torn, or of another release: it is only a cache


def _save(cache: Path, key: list[str | int], known: RunscProbe) -> None:
    writing = cache.with_name(f".{cache.name}.{uuid4().hex}")
    try:
        cache.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        writing.write_text(json.dumps({"key": key, "probe": asdict(known)}))
        os.replace(writing, cache)
    except OSError as error:
        raise SandbatchError(
            f"state folder {cache.parent}", str(error), "see that it can be written"
        ) from error
