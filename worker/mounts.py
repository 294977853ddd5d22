"""What a sandbox has mounted: read-only binds of allowed host folders, and tmpfs.

runsc would make a bind's missing mount point in the root file system, which all its sandboxes share
and which is read-only for runsc, too (`worker.mounted`). So every mount point must be there before:
in the generated root by a generation that has it, in a folder of the user's by the user, in an image
by who built it.
"""

import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from worker.errors import BadInput
from worker.rootfs import check_cwd, check_may_be_given, host_tree, is_host, root_of
from worker.settings import Settings
from worker.spec import Spec
from worker.spec_parts import Mount, plain_path
from worker.tree import Tree

# `bind`, not `rbind`: what is mounted below an allowed folder was not allowed with it.
BIND_OPTIONS = ("bind", "ro", "nosuid", "nodev")
TMPFS_OPTIONS = ("nosuid", "nodev", "mode=1777")


@dataclass(frozen=True)
class Layout:
    """All mounts in OCI's words, parents first, and the mount points that a `host` rootfs needs for them."""

    mounts: list[dict[str, Any]]
    points: Mapping[str, str]  # path without its first slash -> "dir" or "file"


def lay_out(spec: Spec, own: Iterable[dict[str, Any]], settings: Settings) -> Layout:
    """The mounts of a sandbox: `own`, which every sandbox has, and those of the spec, which win.

    Looks at the host and changes nothing.

    Raises:
        BadInput: A source that may not be bound, a target that cannot be a mount point, or a working
            directory that would not be there.
        PermissionError: The caller may not look at a source; root may.
    """
    asked = {one.target: one for one in spec.mounts}
    made = [one for one in own if one["destination"] not in asked]
    made += [_oci(one, settings) for one in spec.mounts]
    made.sort(key=lambda one: len(PurePosixPath(one["destination"]).parts))
    cwd, tmpfs = plain_path(spec.cwd), {one.target for one in spec.mounts if one.type == "tmpfs"}
    tree = host_tree() if is_host(spec) else Tree(folder=root_of(spec, settings))
    points: dict[str, str] = {}
    for mount in made:
        target, source = str(mount["destination"]), Path(str(mount["source"]))
        if target in asked:
            _check_way(tree, target)
            if mount["type"] == "bind":
                points |= _mount_point(tree, target, "dir" if source.is_dir() else "file", spec)
            elif target == cwd:  # runsc makes that folder in the rootfs, too
                points |= _mount_point(tree, target, "dir", spec)
        if mount["type"] == "bind":
            tree = tree.with_bind(target, source)
    if cwd not in tmpfs:
        check_cwd(tree, spec.cwd)
    return Layout(made, points)


def check_source(source: str, settings: Settings) -> Path:
    """The folder or file itself, symlinks followed, if it may be bound.

    What is bound is this path, not the one that was asked for; `worker.mounted.confirm` sees to it that
    it was still this one when runsc mounted it.

    Raises:
        BadInput: It is not below an allowed folder, is no folder or file, or is sandbatch's own.
    """
    what = f"bind {source}"
    try:
        found = Path(source).resolve(strict=True)
        mode = found.lstat().st_mode
    except PermissionError:
        raise
    except (OSError, RuntimeError):
        raise BadInput(what, "there is no such folder or file", "name one on the sandbox's host") from None
    allowed = [folder.resolve() for folder in settings.mount_allow]
    if not any(found.is_relative_to(folder) for folder in allowed):
        known = ", ".join(map(str, allowed)) or "none"
        raise BadInput(
            what,
            f"{found} is not below an allowed folder (allowed: {known})",
            "set SANDBATCH_MOUNT_ALLOW on the host",
        )
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise BadInput(what, "it is a socket, a pipe or a device", "name a folder or a file")
    check_may_be_given(what, found, settings)
    return found


def _oci(mount: Mount, settings: Settings) -> dict[str, Any]:
    if mount.source is not None:
        source, options = str(check_source(mount.source, settings)), list(BIND_OPTIONS)
    else:
        size = [] if mount.size_bytes is None else [f"size={mount.size_bytes}"]
        source, options = "tmpfs", [*TMPFS_OPTIONS, *size]
    return {"destination": mount.target, "type": mount.type, "source": source, "options": options}


def _check_way(tree: Tree, target: str) -> None:
    """runsc follows symlinks when it looks for a target, and its two halves not always alike."""
    path = PurePosixPath(target)
    for part in [*reversed(path.parents), path]:
        kind = tree.look(part)
        if kind.startswith("-> "):
            leads = kind.removeprefix("-> ")
            raise BadInput(
                f"mount at {target}", f"{part} is a symlink (to {leads})", "name the folder itself"
            )
        if kind == "file" and part != path:
            raise BadInput(f"mount at {target}", f"{part} is a file", "name another target")


def _mount_point(tree: Tree, target: str, kind: str, spec: Spec) -> dict[str, str]:
    """What the generated root lacks for this mount; nothing if the mount point is there."""
    path = PurePosixPath(target)
    there = tree.look(path)
    if there == kind:
        return {}
    if there:
        why = "is a folder and the source a file" if there == "dir" else "is a file and the source a folder"
        raise BadInput(f"mount at {target}", f"it {why}", "name another target")
    if is_host(spec) and not tree.is_in_bind(path):
        return {target.lstrip("/"): kind}
    if spec.image is not None and not tree.is_in_bind(path):  # all sandboxes share it: nobody adds to it
        what = "folder" if kind == "dir" else "file"
        raise BadInput(
            f"mount at {target}", f"the image has no such {what}", f"name a {what} of it, or build one in"
        )
    here = tree.host_side(path) or path
    make = f"mkdir -p {shlex.quote(str(here))}"
    if kind == "file":
        make = f"mkdir -p {shlex.quote(str(here.parent))} && touch {shlex.quote(str(here))}"
    raise BadInput(f"mount at {target}", f"the host has no {here} to mount it on", f"make it there: {make}")
