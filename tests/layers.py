"""Images made by hand: OCI layouts of layers that no honest tool would write."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, text: bytes = b"", mode: int = 0o644, **fields: Any) -> Member:
    """A regular file; `fields` are those of a TarInfo (uid, pax_headers, …)."""
    return _info(name, tarfile.REGTYPE, mode=mode, size=len(text), **fields), text


def folder(name: str, mode: int = 0o755, **fields: Any) -> Member:
    return _info(name, tarfile.DIRTYPE, mode=mode, **fields), b""


def symlink(name: str, target: str) -> Member:
    return _info(name, tarfile.SYMTYPE, linkname=target), b""


def hardlink(name: str, target: str) -> Member:
    return _info(name, tarfile.LNKTYPE, linkname=target), b""


def device(name: str, kind: bytes = tarfile.CHRTYPE, major: int = 1, minor: int = 3) -> Member:
    return _info(name, kind, devmajor=major, devminor=minor, mode=0o666), b""


def _info(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(members: Iterable[Member]) -> bytes:
    """A layer as it is before it is compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, text in members:
            archive.addfile(info, io.BytesIO(text))
    return out.getvalue()


def digest_of(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def blobs_of(
    layers: Sequence[Sequence[Member] | bytes],
    config: Mapping[str, Any] | None = None,
    *,
    machine: str = "amd64",
    named_size: int | None = None,
) -> tuple[bytes, dict[str, bytes]]:
    """The manifest of an image, and its blobs by digest. A layer is its members, or a tar's bytes."""
    blobs: dict[str, bytes] = {}
    descriptors, diff_ids = [], []
    for layer in layers:
        plain = layer if isinstance(layer, bytes) else tar(layer)
        packed = gzip.compress(plain, 1, mtime=0)
        blobs[digest_of(packed)] = packed
        size = len(packed) if named_size is None else named_size
        descriptors.append({"mediaType": f"{LAYER}+gzip", "digest": digest_of(packed), "size": size})
        diff_ids.append(digest_of(plain))
    about = json.dumps(
        {
            "architecture": machine,
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    ).encode()
    blobs[digest_of(about)] = about
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest_of(about), "size": len(about)},
        "layers": descriptors,
    }
    return json.dumps(manifest).encode(), blobs


def layout(place: Path, images: Mapping[str, tuple[bytes, dict[str, bytes]]]) -> Path:
    """An OCI layout with an image for each tag."""
    (place / "blobs" / "sha256").mkdir(parents=True)
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entries = []
    for tag, (manifest, blobs) in images.items():
        for digest, raw in {**blobs, digest_of(manifest): manifest}.items():
            (place / "blobs" / "sha256" / digest.partition(":")[2]).write_bytes(raw)
        entry = {"mediaType": MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
        entries.append({**entry, "annotations": {"org.opencontainers.image.ref.name": tag}})
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return place
