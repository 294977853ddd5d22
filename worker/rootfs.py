"""The root file systems of sandboxes: shared, read-only, never copied for one sandbox.

`host` is a small generated folder: mount points, symlinks, and the few files of /etc that programs
need. The programs themselves are the host's own, bound read-only. Each state of the inputs has a
folder of its own, so that a sandbox keeps the one it began with.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from worker.errors import BadInput, SandbatchError
from worker.locks import open_private
from worker.mounted import mounted_below
from worker.settings import Settings
from worker.spec import Spec
from worker.spec_parts import KERNELS_OWN
from worker.sync import sync_folder
from worker.tree import Tree

STORED = re.compile(r"^sha256-[0-9a-f]{64}$")  # an image's folder in the store
NO_POINTS: Mapping[str, str] = {}
CROWD = 32  # generations; each set of mount points of users' binds has one, of about a megabyte
FORMAT = 1  # part of the hash: a change of what is generated makes a new generation
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_DIRS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # symlinks into /usr, or folders
EMPTY_DIRS = ("proc", "sys", "dev", "tmp", "run", "usr", "root", "var", "var/www", "var/www/html")
GENERATED = {
    "var/www/html/index.html": "Hello World!\n",  # the page of gVisor's CNI tutorial
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "etc/resolv.conf": "# no name server: the sandbox's network names none\n",
}
# Of the host's /etc, files that every user may read, and none else: no secrets, no other folder.
ETC_FILES = (
    *("ld.so.cache", "ld.so.conf", "mime.types", "services", "protocols", "host.conf", "os-release"),
    *("localtime", "timezone", "ssl/openssl.cnf"),
)
ETC_DIRS = ("ld.so.conf.d", "ssl/certs", "alternatives")
PRIVATE = b"PRIVATE KEY"


def is_host(spec: Spec) -> bool:
    """Its root is the generated one."""
    return spec.image is None and spec.rootfs == "host"


def root_of(
    spec: Spec, settings: Settings, points: Mapping[str, str] = NO_POINTS, *, build: bool = True
) -> Path:
    """The folder that is a sandbox's root: as asked, or its image's, once its stage `image` has named that.

    Raises:
        BadInput: There is none, or none that is allowed.
    """
    if spec.image is None:
        return resolve_rootfs(spec.rootfs, settings, points, build=build)
    found = Path(spec.rootfs)
    is_stored = found.parts[-1] == "rootfs" and STORED.fullmatch(found.parent.name)
    if not is_stored or found.parents[1] != settings.images_dir or not found.is_dir():
        raise BadInput(f"image {spec.image}", "it is not on this host", "see sandbatch images")
    return found


def resolve_rootfs(
    spec_rootfs: str, settings: Settings, points: Mapping[str, str] = NO_POINTS, *, build: bool = True
) -> Path:
    """The folder of `host` or DIR; `host` is generated where it is missing, if `build`.

    Raises:
        BadInput: DIR is no folder, or not below one that the settings allow (symlinks followed).
    """
    if spec_rootfs == "host":
        return host_rootfs(settings, points, build=build)
    try:
        found = Path(spec_rootfs).resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadInput(f"rootfs {spec_rootfs}", "there is no such folder", "name one on this host") from None
    if not found.is_dir():
        raise BadInput(f"rootfs {spec_rootfs}", "it is no folder", "name a folder")
    if found.is_relative_to(settings.images_dir.resolve()):
        raise BadInput(f"rootfs {spec_rootfs}", "it belongs to the host's images", "name one with --image")
    allowed = [folder.resolve() for folder in settings.rootfs_allow]
    if not any(found.is_relative_to(folder) for folder in allowed):
        known = ", ".join(map(str, allowed)) or "none"
        raise BadInput(
            f"rootfs {spec_rootfs}",
            f"{found} is not below an allowed folder (allowed: {known})",
            "set SANDBATCH_ROOTFS_ALLOW on the host",
        )
    check_may_be_given(f"rootfs {spec_rootfs}", found, settings)
    return found


def check_may_be_given(what: str, found: Path, settings: Settings) -> None:
    """Refuse a folder or file of the host that no sandbox may see, whatever the settings allow.

    Raises:
        BadInput: It is the kernel's, has sandbatch's own files, or something is mounted below it.
    """
    if any(found.is_relative_to(f"/{folder}") for folder in KERNELS_OWN):
        raise BadInput(what, f"{found} is the kernel's", "a sandbox has its own /proc, /sys and /dev")
    for own in (settings.state_dir.resolve(), settings.run_dir.resolve()):
        if found.is_relative_to(own) or own.is_relative_to(found):
            raise BadInput(what, f"sandbatch's own files are in {own}", "name another folder")
    if below := mounted_below(found):  # what is mounted there was not allowed with the folder
        raise BadInput(what, f"{below} is mounted below it", "name a folder without mounts below it")


def host_rootfs(settings: Settings, points: Mapping[str, str] = NO_POINTS, *, build: bool = True) -> Path:
    """The generated root of the host's present state; made where it is not there yet, if `build`.

    Args:
        points: Mount points that it has besides: path without its first slash -> "dir" or "file".
            Each set of them makes a generation of its own: the folder is shared, nobody adds to it later.
    """
    plan = _plan(points)
    found = _generation(settings, plan)
    if build:
        with _builders_lock(settings):  # also where it is there: `prune_host_rootfs` may be at work
            if not found.is_dir():
                _build(plan, found)
    return found


def host_tree() -> Tree:
    """What lies in the generated root, mount points of binds included, whether it is made yet or not."""
    return _tree_of(_fingerprint())


@lru_cache(maxsize=1)
def _tree_of(fingerprint: tuple[object, ...]) -> Tree:
    plan = _plan_of(fingerprint)
    found = dict.fromkeys((*EMPTY_DIRS, *(bind.lstrip("/") for bind in plan["binds"])), "dir")
    found |= dict.fromkeys((*plan["generated"], *plan["copies"]), "file")
    found |= {name: f"-> {target}" for name, target in plan["links"].items()}
    for name in tuple(found):
        found |= {str(parent): "dir" for parent in PurePosixPath(name).parents if str(parent) not in found}
    return Tree(planned=found)


def host_mounts(settings: Settings) -> list[dict[str, Any]]:
    """OCI binds of the host's programs: /usr, what is not merged into it, and python's own folder."""
    return [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro", "nosuid", "nodev"]}
        for path in _bound_paths()
    ]


def host_path(settings: Settings) -> str:
    """PATH in the host rootfs; python's own folder comes last where /usr has no python."""
    prefix = _python_prefix()
    return f"{DEFAULT_PATH}:{prefix}/bin" if prefix else DEFAULT_PATH


def prune_host_rootfs(settings: Settings, in_use: Callable[[], set[Path]]) -> list[Path]:
    """Remove old generations and what killed builders left; those in use and today's stay.

    Safe beside launches: `in_use` is asked under the builders' lock, and a launch journals which
    generation it will use before it takes that lock to see whether it is there.
    """
    with _builders_lock(settings):
        keep = {*in_use(), _generation(settings, _plan(NO_POINTS))}
        gone = [path for path in generations(settings) if path not in keep]
        for path in gone:
            shutil.rmtree(path)
    return gone


def is_crowded(settings: Settings) -> bool:
    """There are so many generations that it is time to look which are still used."""
    return len(generations(settings)) > CROWD


def check_cwd(tree: Tree, cwd: str) -> None:
    """Refuse a working directory that the rootfs lacks: runsc would make it there, on the host.

    Raises:
        BadInput: There is no such folder.
    """
    if tree.follow(cwd) != "dir":
        raise BadInput(f"cwd {cwd}", "there is no such folder in the rootfs", "name one that it has")


def usr_has_python() -> bool:
    """A python3 on the default PATH that lies below /usr, and so in the sandbox, too."""
    for folder in ("/usr/bin", "/usr/local/bin"):
        python = Path(folder, "python3")
        if python.exists() and python.resolve().is_relative_to("/usr"):
            return True
    return False


def _python_prefix() -> str | None:
    prefix = Path(sys.base_prefix).resolve()
    return None if usr_has_python() or prefix.is_relative_to("/usr") else str(prefix)


def _bound_paths() -> list[str]:
    folders = [f"/{name}" for name in PROGRAM_DIRS if _is_real_dir(Path("/", name))]
    prefix = _python_prefix()
    return ["/usr", *folders, *([prefix] if prefix else [])]


def _is_real_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _plan(points: Mapping[str, str]) -> dict[str, Any]:
    """All that the generated folder is made of; two equal plans make equal folders."""
    return {**_plan_of(_fingerprint()), **({"points": dict(points)} if points else {})}


def _fingerprint() -> tuple[object, ...]:
    """A cheap look (0.1 ms) that changes when a plan (30 ms) would: packages write by rename."""
    names = [*ETC_FILES, *ETC_DIRS, "ssl/certs/ca-certificates.crt"]
    found = [os.lstat(f"/etc/{name}") if os.path.lexists(f"/etc/{name}") else None for name in names]
    times = ((stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None for stat in found)
    return (*times, *_bound_paths())


@lru_cache(maxsize=1)
def _plan_of(_fingerprint: tuple[object, ...]) -> dict[str, Any]:
    links = {name: os.readlink(f"/{name}") for name in PROGRAM_DIRS if Path("/", name).is_symlink()}
    links |= {"var/run": "../run", "var/tmp": "../tmp", "etc/mtab": "../proc/mounts"}
    copies = {}
    for path in _etc_paths():
        inside = str(path.relative_to("/"))
        found = path.lstat()
        if path.is_symlink():
            target = os.readlink(path)
            # Into /usr or beside it: a link that leads elsewhere could only dangle in the sandbox.
            if str(path.parent.joinpath(target).resolve()).startswith(("/usr/", "/etc/ssl/certs/")):
                links[inside] = target
        elif path.is_file() and found.st_mode & 0o004:
            copies[inside] = [found.st_size, found.st_mtime_ns, found.st_ino]
    return {
        "format": FORMAT,
        "generated": GENERATED,
        "links": links,
        "copies": copies,
        "binds": _bound_paths(),
    }


def _etc_paths() -> Iterator[Path]:
    etc = Path("/etc")
    yield from (etc / name for name in ETC_FILES if os.path.lexists(etc / name))
    for name in ETC_DIRS:
        if (etc / name).is_dir():
            yield from sorted((etc / name).iterdir())


def _generation(settings: Settings, plan: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    return _rootfs_dir(settings) / f"host-{digest[:16]}"


def generations(settings: Settings) -> list[Path]:
    """Whole ones, and what killed builders left."""
    folder = _rootfs_dir(settings)
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _rootfs_dir(settings: Settings) -> Path:
    return settings.state_dir / "rootfs"


@contextmanager
def _builders_lock(settings: Settings) -> Iterator[None]:
    folder = _rootfs_dir(settings)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(folder / ".lock", "w", opener=open_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(plan: dict[str, Any], found: Path) -> None:
    """Build beside, flush, rename: a generation is there whole or not at all, also after a power cut."""
    building = found.with_name(f".building-{uuid4().hex}")
    building.mkdir(mode=0o755)
    try:
        for name in (*EMPTY_DIRS, *(bind.lstrip("/") for bind in plan["binds"])):
            (building / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        for name, text in plan["generated"].items():
            _write(building / name, text.encode())
        for name in plan["copies"]:
            content = Path("/", name).read_bytes()
            if PRIVATE not in content:  # somebody's key among the certificates
                _write(building / name, content)
        for name, kind in plan.get("points", {}).items():
            if kind == "file":
                _write(building / name, b"")
            else:
                (building / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        for name, target in plan["links"].items():
            (building / name).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            (building / name).symlink_to(target)
        for folder, _, _ in os.walk(building):
            sync_folder(Path(folder))
        building.rename(found)
    except BaseException as error:
        shutil.rmtree(building)
        if isinstance(error, OSError):
            raise SandbatchError("rootfs host", str(error), "see that the state folder has room") from error
        raise
    sync_folder(found.parent)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
