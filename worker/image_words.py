"""What skopeo and umoci say, in words for people: what it means, what to do, and whether it can pass."""

import json
import re
from dataclasses import dataclass

from worker.errors import ImageError

LONGEST = 300
MSG = re.compile(r'\blevel=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')
LEADS = re.compile(
    r'^(?:\W*create rootfs: |unpack layer: |unpack entry: |Error parsing image name "[^"]*": )+'
)
QUERY = re.compile(r'\?[^\s"]+')  # of a URL: it may hold a signature
LOGIN = re.compile(r"://[^/\s\"@]+@")
NAME_IT = "see the name, the tag and the registry"
LOG_IN = (
    "see the name; for a private image log in: skopeo login --authfile FILE, SANDBATCH_REGISTRY_AUTH_FILE"
)
REGISTRIES = "see registries.conf (SANDBATCH_REGISTRIES_CONF)"
SPACE = "free some on the host: sandbatch image prune"


@dataclass(frozen=True)
class Meaning:
    """`words` is a pattern of what was said; without `why`, what was said is shown."""

    words: str
    why: str
    todo: str
    can_pass: bool = False


# The first that fits counts. What fits none cannot pass, as far as anybody knows.
MEANINGS = (
    Meaning(r"no space left on device", "the disk is full, or has no inode left", SPACE),
    Meaning(r"disk quota exceeded", "the disk quota is used up", SPACE),
    Meaning(
        r"file too large|SIGXFSZ|file size limit exceeded",
        "it has a file larger than a whole image may be",
        "set SANDBATCH_IMAGE_MAX_BYTES higher, if you trust it",
    ),
    Meaning(r"trust policy|policy\.json", "", "apt-get install golang-github-containers-common"),
    Meaning(r"loading registries configuration", "", REGISTRIES),
    Meaning(r"registry \S+ is blocked", "", REGISTRIES),
    Meaning(r"Source image rejected|Running image .* is not allowed", "", "see /etc/containers/policy.json"),
    Meaning(r"toomanyrequests|\b429\b|too many requests", "", "the registry asks for patience", True),
    Meaning(r"manifest unknown", "the registry does not know this tag or digest", NAME_IT),
    Meaning(r"name unknown|repository name not known", "the registry has no such repository", NAME_IT),
    Meaning(
        r"unauthorized|denied|authentication required|invalid username/password|incorrect username"
        r"|\b40[13]\b",
        "the registry denies it",
        LOG_IN,
    ),
    Meaning(r"StatusCode: 404|\b404 \(Not Found\)|blob unknown", "the registry does not have it", NAME_IT),
    Meaning(
        r"server gave HTTP response to HTTPS|does not look like a TLS handshake",
        "the registry speaks plain HTTP",
        "if that is meant, mark it insecure in registries.conf (SANDBATCH_REGISTRIES_CONF)",
    ),
    Meaning(r"x509:|certificate", "", "have its CA in the host's store, or in /etc/containers/certs.d"),
    Meaning(
        r"[Dd]igest did not match|does not match provided manifest digest|verification failed"
        r"|blob hash mismatch|size mismatch|descriptor size",
        "what came is not what its digest says",
        "nothing of it is used; ask who runs the registry",
    ),
    Meaning(
        r"no image found in .*manifest list|no child with platform", "", "it is built for other machines"
    ),
    Meaning(r"invalid reference format", "", NAME_IT),
    Meaning(r"no descriptor found|choose an image|Tag .* not found", "", "name one of its tags"),
    Meaning(r"no such host", "", NAME_IT),
    Meaning(
        r"\bEOF\b|connection reset|connection refused|broken pipe|i/o timeout|timed out|[Tt]imeout"
        r"|network is unreachable|no route to host|host is down|server misbehaving|temporary failure"
        r"|deadline exceeded|stream error|GOAWAY|use of closed network|http2: "
        r"|HTTP status: 5\d\d|from registry 5\d\d|StatusCode: 5\d\d|from registry 408|StatusCode: 408",
        "",
        "see the registry and the network",
        True,
    ),
)


def meaning(what: str, said: str) -> ImageError:
    """The error for what a program said last; `what` is whatever it concerns."""
    words = plain(said)
    for one in MEANINGS:
        if re.search(one.words, words):
            why = f"{one.why} ({words})" if one.why else words
            return ImageError(what, why, one.todo, one.can_pass)
    return ImageError(what, words, "")


def plain(said: str) -> str:
    """The last message of a Go program, without its frame, and without what a log must not have."""
    messages = MSG.findall(said)
    text = json.loads(f'"{messages[-1]}"', strict=False) if messages and _is_json(messages[-1]) else ""
    if not text:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        crash = [line for line in lines if line.startswith(("SIGXFSZ", "fatal error", "panic:"))]
        text = (crash or lines[-1:] or ["it ended without a word"])[0]
    text = LOGIN.sub("://***@", QUERY.sub("?…", LEADS.sub("", text)))
    text = "".join(one if one.isprintable() else " " for one in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _is_json(text: str) -> bool:
    try:
        json.loads(f'"{text}"', strict=False)
    except ValueError:
        return False
    return True
