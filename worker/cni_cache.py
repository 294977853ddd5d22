"""libcni's result cache, in libcni's place and format, so that cnitool or podman can DEL what we attached."""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

KIND = "cniCacheV1"


@dataclass(frozen=True)
class CacheEntry:
    """One attachment that ADD has made: its configuration and its final result."""

    network: str
    container_id: str
    if_name: str
    netns: str
    config: bytes
    cni_args: tuple[tuple[str, str], ...]
    capability_args: dict[str, Any]
    result: dict[str, Any] | None
    path: Path


def entry_path(cache_dir: Path, network: str, container_id: str, if_name: str) -> Path:
    return cache_dir / "results" / f"{network}-{container_id}-{if_name}"


def save(
    cache_dir: Path,
    *,
    network: str,
    container_id: str,
    if_name: str,
    netns: str,
    config: bytes,
    cni_args: tuple[tuple[str, str], ...],
    capability_args: dict[str, Any],
    result: dict[str, Any],
) -> None:
    """Write the entry by rename; flushed, since DEL after a power cut needs it."""
    path = entry_path(cache_dir, network, container_id, if_name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "kind": KIND,
        "containerId": container_id,
        "config": base64.b64encode(config).decode(),
        "ifName": if_name,
        "networkName": network,
        "netns": netns,
    }
    if cni_args:
        document["cniArgs"] = [list(pair) for pair in cni_args]
    if capability_args:
        document["capabilityArgs"] = capability_args
    document["result"] = result
    temporary = path.parent.parent / f".{path.name}.{uuid4().hex}"  # not in results/: others list that folder
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as out:
        json.dump(document, out, separators=(",", ":"))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)


def load(cache_dir: Path, network: str, container_id: str, if_name: str) -> CacheEntry | None:
    """The entry, or None where there is none that can be read."""
    return read(entry_path(cache_dir, network, container_id, if_name))


def read(path: Path) -> CacheEntry | None:
    """An entry from its file; None for a file that is missing, torn or not of libcni."""
    try:
        found = json.loads(path.read_bytes())
        if found["kind"] != KIND:
            return None
        return CacheEntry(
            found["networkName"],
            found["containerId"],
            found["ifName"],
            found.get("netns", ""),
            base64.b64decode(found["config"]),
            tuple((str(key), str(value)) for key, value in found.get("cniArgs") or []),
            dict(found.get("capabilityArgs") or {}),
            found.get("result"),
            path,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def forget(cache_dir: Path, network: str, container_id: str, if_name: str) -> None:
    entry_path(cache_dir, network, container_id, if_name).unlink(missing_ok=True)


def list_entries(cache_dir: Path) -> list[CacheEntry]:
    """Every readable entry, ours and those of other runtimes."""
    folder = cache_dir / "results"
    found = (read(path) for path in sorted(folder.iterdir())) if folder.is_dir() else iter(())
    return [entry for entry in found if entry is not None]
