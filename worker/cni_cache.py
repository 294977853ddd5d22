"""libcni's result cache, in libcni's place and format, so that cnitool or podman can DEL what we attached."""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.cni_json import loads
from worker.cni_result import converted, typed
from worker.errors import SandbatchError

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
    return cache_dir / "results" / f"{network}-{container_id}-{if_name}".replace("/", "_")


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
    }
    if netns:
        document["netns"] = netns
    if cni_args:
        document["cniArgs"] = [list(pair) for pair in cni_args]
    if capability_args:
        document["capabilityArgs"] = capability_args
    document["result"] = result
    temporary = _temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "w") as out:
        json.dump(document, out, separators=(",", ":"))
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)


def load(cache_dir: Path, network: str, container_id: str, if_name: str) -> CacheEntry | None:
    """The entry, or None where there is none that can be read."""
    return read(entry_path(cache_dir, network, container_id, if_name))


def load_result(
    cache_dir: Path, network: str, container_id: str, if_name: str, version: str
) -> dict[str, Any] | None:
    """ADD's result as `version` has it; None where there is no entry. The first entries were a bare result.

    Raises:
        SandbatchError: There is a file, but no result in it.
    """
    path = entry_path(cache_dir, network, container_id, if_name)
    try:
        entry = read(path)
        result = loads(path.read_text(errors="replace")) if entry is None else entry.result
        return converted(typed(result, "0.1.0"), version)
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        why = f"holds no result ({error})"
        raise SandbatchError(f"CNI cache entry {path}", why, "DEL removes it") from None


def read(path: Path) -> CacheEntry | None:
    """An entry from its file; None for a file that is missing, torn or not of libcni."""
    try:
        found = loads(path.read_text(errors="replace"))
        if found["kind"] != KIND:
            return None
        return CacheEntry(
            _checked(found, "networkName", str) or "",
            _checked(found, "containerId", str) or "",
            _checked(found, "ifName", str) or "",
            _checked(found, "netns", str) or "",
            base64.b64decode(_checked(found, "config", str) or ""),
            tuple((str(key), str(value)) for key, value in _checked(found, "cniArgs", list) or []),
            _checked(found, "capabilityArgs", dict) or {},
            _checked(found, "result", dict),
            path,
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checked(found: dict[str, Any], key: str, wanted: type) -> Any:
    value = found.get(key)
    if value is not None and not isinstance(value, wanted):
        raise TypeError(key)
    return value


def forget(cache_dir: Path, network: str, container_id: str, if_name: str) -> None:
    """Remove the entry, and what a killed `save` has left of it. Safe to repeat."""
    path = entry_path(cache_dir, network, container_id, if_name)
    path.unlink(missing_ok=True)
    _temporary(path).unlink(missing_ok=True)


def list_entries(cache_dir: Path) -> list[CacheEntry]:
    """Every readable entry that is of an attachment, ours and those of other runtimes."""
    folder = cache_dir / "results"
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)
    except OSError:  # as libcni: without a folder there is nothing to free
        return []
    entries = [entry for entry in (read(folder / name) for name in names) if entry is not None]
    return [entry for entry in entries if entry.network and entry.if_name]


def _temporary(path: Path) -> Path:
    """Not in results/, which others list; one name an attachment, so that a killed writer leaves no pile."""
    return path.parent.parent / f".{path.name}.sandbatch"
