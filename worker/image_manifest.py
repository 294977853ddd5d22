"""What the JSON of an image says: sizes, platform, configuration. A stranger wrote it: nothing is sure."""

import json
import os
from pathlib import Path
from typing import Any

from worker.errors import ImageError
from worker.image_ref import is_digest

LAYOUT, NAME = "oci", "x"  # the layout of a pull, and the one image in it
SMALL = 4 << 20  # neither a manifest nor a configuration is larger (containers/image, iolimits)
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
ARCHITECTURES = ("386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x")
CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)


def parsed(raw: bytes) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def own_digest(what: str, index: dict[str, Any]) -> str:
    """Of an index, which manifest is this machine's; empty if it is no index.

    Raises:
        ImageError: It has none for this machine.
    """
    if "manifests" not in index:
        return ""
    manifests = [one for one in _list(index["manifests"]) if isinstance(one, dict)]
    found = []
    for one in manifests:
        platform = one.get("platform")
        platform = platform if isinstance(platform, dict) else {}
        found.append(f"{platform.get('os', '?')}/{platform.get('architecture', '?')}")
        if platform.get("os") == "linux" and platform.get("architecture") == _own():
            return str(one.get("digest", ""))
    have = ", ".join(dict.fromkeys(found))[:100] or "nothing"
    raise ImageError(what, f"has none for linux/{_own()}", f"it is built for {have}")


def total_size(what: str, manifest: dict[str, Any]) -> int | None:
    """Bytes of its layers, as they come; None where it does not say.

    Raises:
        ImageError: It is no image of a container.
    """
    config = manifest.get("config")
    kind = config.get("mediaType") if isinstance(config, dict) else None
    if kind not in CONFIGS:
        raise ImageError(what, f"is no image of a container, but {str(kind)[:100]}", "see the name")
    sizes = [one.get("size") for one in _list(manifest.get("layers")) if isinstance(one, dict)]
    known = [size for size in sizes if isinstance(size, int) and size >= 0]
    return sum(known) if len(known) == len(sizes) else None


def read_config(what: str, layout: Path) -> dict[str, Any]:
    """The image's configuration, from its layout; it must be for this machine.

    Raises:
        ImageError: It cannot be read, or is another machine's.
    """
    try:
        index = json.loads(_small(layout / "index.json"))
        manifest = json.loads(_blob(layout, index["manifests"][0]["digest"]))
        config = json.loads(_blob(layout, manifest["config"]["digest"]))
        if not isinstance(config, dict):
            raise TypeError
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ImageError(what, "its configuration cannot be read", "see where it comes from") from None
    system, machine = config.get("os") or "linux", config.get("architecture")
    if system != "linux" or (machine in ARCHITECTURES and machine != _own()):
        raise ImageError(what, f"is built for {system}/{machine}, not for linux/{_own()}", "name another")
    return config


def _own() -> str:
    machine = os.uname().machine
    return MACHINES.get(machine, machine)


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _blob(layout: Path, digest: str) -> bytes:
    if not is_digest(digest):  # it becomes a path
        raise ValueError("no digest")
    return _small(layout / "blobs" / digest.replace(":", "/"))


def _small(file: Path) -> bytes:
    with file.open("rb") as opened:
        found = opened.read(SMALL + 1)
    if len(found) > SMALL:
        raise ValueError("too large")
    return found
