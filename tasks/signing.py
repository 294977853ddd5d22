"""Signatures of what is written to the broker, which more people can write to than may start something.

Each user and each host has an Ed25519 key; a host knows the public halves of those that it listens to. A
signature is over the whole of what it is for: Celery's own serializer `auth` signs the body of a message and
not its task, and knows no replay.
"""

import base64
import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.errors import BadInput, SandbatchError
from worker.settings import Settings

if TYPE_CHECKING:  # at run time only where keys are: a client's `ls` has no time for it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

log = logging.getLogger("sandbatch")

KEY_NAME = re.compile(r"^(?P<role>user|host)-(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,62})$")
TOKEN = re.compile(
    r"v1:(?P<who>[A-Za-z0-9_.-]{6,68}):(?P<at>[0-9]{1,12}\.[0-9]{3}):(?P<nonce>[0-9a-f]{32}):(?P<signature>[\w-]{86})"
)
SKEW_S = 300.0  # between the clocks of two machines
REREAD_S = 1.0  # the folder of public keys is looked at no more often
LEAST_TO_DROP = 1000  # lines of the file of what was seen


class Refused(SandbatchError):
    """What was sent is not from somebody who may send it, or not from now."""


@dataclass(frozen=True)
class Signed:
    """By whom, and when (seconds since the epoch)."""

    role: str  # user, host
    name: str
    at: float
    nonce: str

    @property
    def by(self) -> str:
        return f"{self.role} {self.name}"


class Signer:
    """One private key."""

    def __init__(self, who: str, key: "Ed25519PrivateKey") -> None:
        self.who, self._key = who, key

    @classmethod
    def read(cls, path: Path) -> "Signer":
        """The key in a PEM file, whose name says whose it is: `user-NAME.key` or `host-NAME.key`.

        Raises:
            BadInput: It is none, or others may read it.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        what, todo = f"signing_key {path}", "make keys with sandbatch keys"
        if path.suffix != ".key" or not KEY_NAME.fullmatch(path.stem):
            raise BadInput(what, "its name is neither user-NAME.key nor host-NAME.key", todo)
        try:
            if path.stat().st_mode & 0o007:
                raise BadInput(what, "every user of this machine may read or change it", f"chmod 600 {path}")
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise BadInput(what, str(error.strerror), "check the path, and who may read it") from None
        except (ValueError, TypeError) as error:
            raise BadInput(what, f"it is no private key in PEM ({str(error)[:80]})", todo) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise BadInput(what, "it is no Ed25519 key", todo)
        return cls(path.stem, key)

    def sign(self, purpose: str, parts: Sequence[str | bytes]) -> str:
        """A token that says that we say `parts`, now."""
        at, nonce = f"{time.time():.3f}", secrets.token_hex(16)
        signature = self._key.sign(_bytes(purpose, self.who, at, nonce, parts))
        return f"v1:{self.who}:{at}:{nonce}:{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


class Trust:
    """The public keys of those whom this host listens to: `user-NAME.pub` and `host-NAME.pub` in a folder.

    The folder is read again when it has changed: who leaves is shut out at once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._looked_at = 0.0
        self._seen_as: tuple[tuple[Path, int, int], ...] = ()
        self._look()

    def names(self) -> list[str]:
        """Whose keys there are, as `user-NAME` and `host-NAME`."""
        self._look()
        return sorted(self._keys)

    def verify(
        self, purpose: str, parts: Sequence[str | bytes], token: object, *, max_age_s: float
    ) -> Signed:
        """Who says `parts`.

        Raises:
            Refused: Nobody, or nobody whom we know, or too long ago.
        """
        from cryptography.exceptions import InvalidSignature

        if not token:
            raise Refused(purpose, "it is not signed", "set signing_key where it was sent")
        found = TOKEN.fullmatch(token) if isinstance(token, str) else None
        who = KEY_NAME.fullmatch(found["who"]) if found else None
        if found is None or who is None:
            raise Refused(purpose, "its signature is none", "is its sender of another release?")
        self._look()
        key = self._keys.get(found["who"])
        if key is None:
            todo = f"put {found['who']}.pub into {self._folder} if it is to be trusted"
            raise Refused(purpose, f"it is of {found['who']}, whose key this host does not know", todo)
        try:
            said = _bytes(purpose, found["who"], found["at"], found["nonce"], parts)
            key.verify(base64.urlsafe_b64decode(found["signature"] + "=="), said)
        except (InvalidSignature, ValueError):
            why = f"its signature is not of {found['who']}, or it was changed since"
            raise Refused(purpose, why, "is there another key of that name?") from None
        signed = Signed(who["role"], who["name"], float(found["at"]), found["nonce"])
        age_s = time.time() - signed.at
        if age_s > max_age_s:
            raise Refused(purpose, f"{signed.by} signed it {age_s:.0f} s ago", "send it again")
        if age_s < -SKEW_S:
            raise Refused(purpose, f"{signed.by} signed it in {-age_s:.0f} s", "set both clocks right")
        return signed

    def _look(self) -> None:
        if self._looked_at and time.monotonic() - self._looked_at < REREAD_S:
            return
        try:
            self._read()
        except BadInput as error:
            if not self._looked_at:
                raise
            log.error("keys stay as they were: %s", error)  # a slip of the hand shuts nobody out
        self._looked_at = time.monotonic()

    def _read(self) -> None:
        try:
            if self._folder.stat().st_mode & 0o022:
                why, todo = "others than its owner may write to it", f"chmod go-w {self._folder}"
                raise BadInput(f"trusted_keys {self._folder}", why, todo)
            files = sorted(path for path in self._folder.iterdir() if path.suffix == ".pub")
            seen_as = tuple((path, path.stat().st_mtime_ns, path.stat().st_ino) for path in files)
            if seen_as != self._seen_as:
                self._keys = {path.stem: _public_key(path) for path in files}
                self._seen_as = seen_as
        except OSError as error:
            what = f"trusted_keys {self._folder}"
            raise BadInput(what, str(error.strerror), "check the path, and who may read it") from None


def _public_key(path: Path) -> "Ed25519PublicKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    what, todo = f"trusted key {path}", "take it away, or put the right file there"
    if not KEY_NAME.fullmatch(path.stem):
        raise BadInput(what, "its name is neither user-NAME.pub nor host-NAME.pub", todo)
    try:
        key = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        raise BadInput(what, f"it is no public key in PEM ({str(error)[:80]})", todo) from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(what, "it is no Ed25519 key", todo)
    return key


def _bytes(purpose: str, who: str, at: str, nonce: str, parts: Sequence[str | bytes]) -> bytes:
    """What is signed: each part with its length, so that no two lists of parts make the same bytes."""
    words = [*(one.encode() for one in ("sandbatch/v1", purpose, who, at, nonce))]
    words += [one.encode() if isinstance(one, str) else one for one in parts]
    return b"".join(len(one).to_bytes(8, "big") + one for one in words)


class Seen:
    """What was taken and must not be taken again, kept in a file so that a new worker knows it, too.

    Safe for several processes, and for a kill at any moment: a line is one write under a lock.

    Args:
        keep_s: For how long after its moment: what is older is refused for its age.
    """

    def __init__(self, path: Path, keep_s: float) -> None:
        self._path, self._keep_s = path, keep_s
        self._known: dict[str, float] = {}
        self._inode, self._read_to = 0, 0

    def __contains__(self, name: str) -> bool:
        with self._locked():
            self._read()
        return name in self._known

    def add(self, name: str, at: float) -> bool:
        """Note it; False if it was there."""
        with self._locked():
            self._read()
            if name in self._known:
                return False
            # A new line first: what a full disk or a kill has cut off must not spoil this one.
            with self._path.open("ab", buffering=0) as file:
                file.write(f"\n{at:.3f} {name}".encode())
            self._known[name] = at
            self._drop_old()
            return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _read(self) -> None:
        """What other processes have added since."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._known, self._inode, self._read_to = {}, inode, 0
                file.seek(self._read_to)
                lines = file.read()
                self._read_to += len(lines)
        except FileNotFoundError:
            self._known, self._inode, self._read_to = {}, 0, 0
            return
        for line in lines.splitlines():
            at, _, name = line.decode(errors="replace").partition(" ")
            with contextlib.suppress(ValueError):  # what was cut off
                self._known[name] = float(at)

    def _drop_old(self) -> None:
        oldest = time.time() - self._keep_s
        if len(self._known) < LEAST_TO_DROP or sum(at < oldest for at in self._known.values()) * 2 < len(
            self._known
        ):
            return
        kept = {name: at for name, at in self._known.items() if at >= oldest}
        writing = self._path.with_name(self._path.name + ".new")
        writing.write_text("".join(f"\n{at:.3f} {name}" for name, at in kept.items()))
        writing.rename(self._path)
        self._inode = 0


def signer(settings: Settings) -> Signer | None:
    """The key of the settings; None: nothing is signed.

    Raises:
        BadInput: It cannot be used.
    """
    return _signer(settings.signing_key) if settings.signing_key else None


def trust(settings: Settings) -> Trust | None:
    """Whom this host listens to; None: to everybody who can write to the broker.

    Raises:
        BadInput: A key of the folder cannot be used.
    """
    return _trust(settings.trusted_keys) if settings.trusted_keys else None


def check_host(settings: Settings) -> None:
    """See that a host which listens only to some can itself be listened to.

    Raises:
        BadInput: It cannot, or its keys cannot be used.
    """
    known, own = trust(settings), signer(settings)
    if known is None and own is None:
        return
    if known is None:
        why = "this host would sign what it sends, and take anything from anybody"
        raise BadInput("trusted_keys", why, "set it to the folder of public keys")
    if own is None or own.who != f"host-{settings.host}":
        why = (
            f"it is {own.who if own else 'none'}, and this host, {settings.host}, signs what it sends itself"
        )
        todo = f"set it to host-{settings.host}.key: sandbatch keys"
        raise BadInput(f"signing_key {settings.signing_key or ''}".strip(), why, todo)
    if own.who not in known.names():
        todo = f"put {own.who}.pub into {settings.trusted_keys}"
        raise BadInput(
            f"trusted_keys {settings.trusted_keys}", "this host would refuse its own messages", todo
        )


def seen(settings: Settings) -> Seen:
    """The messages and calls that this host has done with."""
    return _seen(settings.run_dir / "seen", settings.message_age_s + SKEW_S)


@lru_cache(maxsize=4)
def _signer(path: Path) -> Signer:
    return Signer.read(path)


@lru_cache(maxsize=4)
def _trust(folder: Path) -> Trust:
    return Trust(folder)


@lru_cache(maxsize=4)
def _seen(path: Path, keep_s: float) -> Seen:
    return Seen(path, keep_s)


def make_key(folder: Path, who: str) -> tuple[Path, Path]:
    """Make a pair of keys, `WHO.key` (0600) and `WHO.pub`, in a folder where they are not yet.

    Args:
        who: `user-NAME` or `host-NAME`.
    Raises:
        BadInput: It is no such name.
        FileExistsError: There is one already.
    """
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not KEY_NAME.fullmatch(who):
        raise BadInput(f"key {who!r}", "a name of letters, digits, '_', '.', '-' is needed", "choose another")
    key = Ed25519PrivateKey.generate()
    pem: Any = forms.Encoding.PEM
    private = key.private_bytes(pem, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes(pem, forms.PublicFormat.SubjectPublicKeyInfo)
    paths = folder / f"{who}.key", folder / f"{who}.pub"
    for path, text, mode in ((paths[0], private, 0o600), (paths[1], public, 0o644)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(text)
    return paths
