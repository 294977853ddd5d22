"""The name of an image as a user writes it, and as everything else knows it: checked, and made whole.

The grammar is that of Docker's `distribution/reference`; a short name is completed as docker does.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

DEFAULT_REGISTRY, DEFAULT_REPOSITORY, DEFAULT_TAG = "docker.io", "library", "latest"
TRANSPORTS = ("docker", "oci", "docker-archive", "oci-archive")
# Words that skopeo knows. The second ones are also plain names of images, unless a path follows.
UNSUPPORTED = ("containers-storage", "docker-daemon")
UNSUPPORTED_PATHS = ("dir", "ostree", "sif", "tarball", "atomic")
LONGEST_NAME, LONGEST_PATH = 255, 4095
LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
DOMAIN = re.compile(rf"(?:{LABEL}(?:\.{LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
PATH = re.compile(rf"{PART}(?:/{PART})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
OCI_PART = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
OCI_TAG = re.compile(rf"{OCI_PART}(?:/{OCI_PART})*")  # containers/image oci/internal: refRegexp
SOURCE_INDEX = re.compile(r"@[0-9]{1,9}")
IMAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageRef:
    """Where an image comes from: a registry's repository, or a folder or file of the host.

    `name` is the repository with its registry, or the path. A repository has a tag or a digest, never
    both; a folder or an archive may have neither, where it holds one image.
    """

    transport: str
    name: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        """The canonical form, which `parse_image` takes again."""
        if self.transport == "docker":
            return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"
        return f"{self.transport}:{self.name}" + (f":{self.tag}" if self.tag else "")

    @property
    def is_remote(self) -> bool:
        return self.transport == "docker"

    def source(self, digest: str = "") -> str:
        """skopeo's word for it; of a registry the very manifest `digest`, whatever the tag says by now."""
        if not self.is_remote:
            return str(self)
        digest = digest or self.digest
        return f"docker://{self.name}@{digest}" if digest else f"docker://{self}"


def parse_image(text: str) -> ImageRef:
    """The image that `text` names; paths must be absolute (see `absolute`).

    Raises:
        ValueError: It names none; the words say why.
    """
    if not text or text != text.strip() or not text.isprintable() or len(text) > LONGEST_PATH + 300:
        raise ValueError("an image is a printable name without spaces around it, such as busybox:1.36")
    scheme, colon, rest = text.partition(":")
    if scheme in UNSUPPORTED or (scheme in UNSUPPORTED_PATHS and rest.startswith("/")):
        raise ValueError(f"{scheme}: is not supported; {_schemes()}")
    if colon and rest.startswith("//") and scheme != "docker":
        raise ValueError(f"{scheme}:// is no source of images; write registry/name:tag; {_schemes()}")
    if colon and scheme in TRANSPORTS and scheme != "docker":
        return _local(scheme, rest)
    return _repository(text.removeprefix("docker://"))


def absolute(text: str, folder: Path) -> str:
    """`text` with its relative path, if it has one, taken from `folder`: the host has another one."""
    scheme, colon, rest = text.partition(":")
    if colon and rest and scheme in TRANSPORTS and scheme != "docker":
        path, tag_colon, tag = rest.partition(":")
        return f"{scheme}:{os.path.normpath(folder / path)}{tag_colon}{tag}" if path else text
    return text


def is_digest(text: str) -> bool:
    return DIGEST.fullmatch(text) is not None


def _schemes() -> str:
    return "known are docker://NAME, oci:DIR[:TAG], docker-archive:FILE and oci-archive:FILE"


def _local(transport: str, rest: str) -> ImageRef:
    path, colon, tag = rest.partition(":")
    if not path.startswith("/"):
        raise ValueError(f"{transport}: needs an absolute path, not {path!r}")
    if ".." in PurePosixPath(path).parts:
        raise ValueError(f"{transport}: needs a path without '..'")
    if len(path) > LONGEST_PATH or (colon and not tag):
        raise ValueError(f"{transport}:{path[:80]} is no path with a tag behind its ':'")
    if tag and transport == "docker-archive":
        if not SOURCE_INDEX.fullmatch(tag):
            found = _repository(tag)
            if found.digest:
                raise ValueError(f"{tag!r} has a digest: an archive knows its images by name and tag")
            tag = str(found)
    elif tag and not OCI_TAG.fullmatch(tag):
        raise ValueError(f"{tag!r} is no tag of an OCI layout (and a path cannot have a ':')")
    return ImageRef(transport, "/" + "/".join(PurePosixPath(path).parts[1:]), tag)


def _repository(text: str) -> ImageRef:
    left, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise ValueError(f"{digest!r} is no digest: sha256: and 64 hex digits are needed")
    name, tag = left, ""
    if ":" in left.rpartition("/")[2]:
        name, _, tag = left.rpartition(":")
        if not TAG.fullmatch(tag):
            raise ValueError(f"{tag!r} is no tag: at most 128 letters, digits, '_', '.' and '-'")
    if IMAGE_ID.fullmatch(name):
        raise ValueError("64 hex digits are an id of docker's, no name of an image")
    domain, path = _split(name)
    if not path:
        raise ValueError(f"{text!r} has no name of an image; {_schemes()}")
    if path != path.lower():
        raise ValueError(f"{path!r} is no repository: its name must be lowercase")
    if not DOMAIN.fullmatch(domain) or not PATH.fullmatch(path):
        raise ValueError(f"{name!r} is no name of an image, such as registry:5000/team/name")
    if len(f"{domain}/{path}") > LONGEST_NAME:
        raise ValueError(f"a name of an image has at most {LONGEST_NAME} characters")
    # As docker: with a digest the tag says nothing, and skopeo refuses both.
    return ImageRef("docker", f"{domain}/{path}", "" if at else tag or DEFAULT_TAG, digest)


def _split(name: str) -> tuple[str, str]:
    """Registry and path, as docker splits them: the first part is a registry if it looks like a host."""
    first, slash, rest = name.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not is_host:
        first, rest = DEFAULT_REGISTRY, name
    if first in (DEFAULT_REGISTRY, f"index.{DEFAULT_REGISTRY}"):
        first = DEFAULT_REGISTRY
        if rest and "/" not in rest:
            rest = f"{DEFAULT_REPOSITORY}/{rest}"
    return first, rest
