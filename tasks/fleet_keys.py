"""What `sandbatch keys` writes: the secrets of a fleet, in a folder for each who gets some.

    DIR/fleet.json  ca.key  ca.crt      stay here: who has them can make any of the rest
        trusted/                        public keys of all; each host has a copy
        broker/                         certificate, users, a piece of redis.conf
        host-NAME/  user-NAME/  flower/ settings and keys, to be copied to where they are used

Nothing that is there is changed, but that hosts and `trusted` get the public keys of those who are new.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tasks import acl, certificates
from tasks.signing import KEY_NAME, make_key
from worker.errors import BadInput
from worker.spec import HOST_NAME

BROKER_PLACE = Path("/etc/sandbatch-broker")
HOST_PLACE = Path("/etc/sandbatch")
USER_PLACE = Path("~/.config/sandbatch")
FLOWER_PLACE = Path("/etc/sandbatch-flower")
PORT = 6379
ADDRESS = re.compile(
    r"^(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?$"
)


@dataclass(frozen=True)
class Fleet:
    """What all of a fleet's settings have in common. `host` is a name or an address, of IPv6 without []."""

    host: str
    port: int
    has_tls: bool
    passwords: dict[str, str] = field(repr=False)

    def url(self, user: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "rediss" if self.has_tls else "redis"
        return f"{scheme}://{user}:{self.passwords[user]}@{host}:{self.port}/0"


@dataclass
class Written:
    """The folders that are new, the files that were there and have grown."""

    new: list[Path] = field(default_factory=list)
    changed: list[Path] = field(default_factory=list)  # files with a new password
    trusted: list[Path] = field(default_factory=list)  # folders of public keys that have new ones


def write_keys(
    folder: Path,
    broker: str | None,
    hosts: Sequence[str],
    users: Sequence[str],
    *,
    has_tls: bool = True,
    renew: str | None = None,
) -> Written:
    """Write what is not there yet for a broker at HOST[:PORT], these hosts and these users.

    Args:
        renew: A login of the broker that gets a new password, in all files that have it.
    Raises:
        BadInput: A name is none, or the fleet of the folder has another broker.
    """
    for name in hosts:
        if not HOST_NAME.fullmatch(name) or not KEY_NAME.fullmatch(f"host-{name}"):
            raise BadInput(f"host {name!r}", "it is no name of a host", "letters, digits, '_', '.', '-'")
    for name in users:
        if not KEY_NAME.fullmatch(f"user-{name}"):
            raise BadInput(f"user {name!r}", "it is no name", "letters, digits, '_', '.', '-', at most 63")
    if renew not in (None, *acl.USERS):
        raise BadInput(f"--new-password {renew}", "there is no such login", f"one of {', '.join(acl.USERS)}")
    address = _address(broker) if broker else None
    _private(folder)
    fleet = _fleet(folder, address, has_tls)
    written = Written()
    if renew is not None:
        fleet = _renew(folder, fleet, renew, written)
    _write_broker(folder, fleet, written)
    (folder / "trusted").mkdir(exist_ok=True, mode=0o755)
    for who in [*(f"host-{one}" for one in hosts), *(f"user-{one}" for one in users)]:
        _write_member(folder, fleet, who, written)
    _write_flower(folder, fleet, written)
    _spread(folder, written)
    return written


def _address(text: str) -> tuple[str, int]:
    match = ADDRESS.fullmatch(text)
    port = int(match["port"] or PORT) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise BadInput(f"--broker {text}", "HOST or HOST:PORT is needed, an IPv6 address in []", "correct it")
    return match["host"].strip("[]"), port


def _fleet(folder: Path, address: tuple[str, int] | None, has_tls: bool) -> Fleet:
    file = folder / "fleet.json"
    if not file.exists():
        if address is None:
            raise BadInput("--broker", "it is needed for a new fleet", "name the broker's HOST[:PORT]")
        if any(folder.iterdir()):
            raise BadInput(f"folder {folder}", "it is neither empty nor a fleet's", "name a new folder")
        fleet = Fleet(*address, has_tls, {name: secrets.token_hex(32) for name in acl.USERS})
        if has_tls and not (folder / "ca.key").exists():
            certificates.make_ca(folder)
        _write(file, _document(fleet))
        return fleet
    try:
        fleet = Fleet(**json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise BadInput(f"file {file}", "it is none of sandbatch keys", "name a new folder") from None
    if address not in (None, (fleet.host, fleet.port)) or (address and fleet.has_tls != has_tls):
        words = f"its fleet has the broker {fleet.host}:{fleet.port}{'' if fleet.has_tls else ' without TLS'}"
        raise BadInput(f"folder {folder}", words, "name that one, or a new folder")
    return fleet


def _renew(folder: Path, fleet: Fleet, user: str, written: Written) -> Fleet:
    """Give a login a new password; the rest of the files stays."""
    old, new = fleet.passwords[user], secrets.token_hex(32)
    changed = replace(fleet, passwords={**fleet.passwords, user: new})
    _write(folder / "fleet.json", _document(changed), anew=True)  # of which the others can be made again
    files = [folder / "broker" / "users.acl", *sorted(folder.glob("*/sandbatch.toml"))]
    for file in (one for one in files if one.exists()):
        text = file.read_text()
        renewed = text.replace(old, new).replace(acl.digest(old), acl.digest(new))
        if renewed != text:
            _write(file, renewed, anew=True)
            written.changed.append(file)
    return changed


def _document(fleet: Fleet) -> str:
    return json.dumps(fleet.__dict__, indent=2) + "\n"


def _write_broker(folder: Path, fleet: Fleet, written: Written) -> None:
    broker = folder / "broker"
    if not broker.exists():
        _private(broker)
        written.new.append(broker)
    if fleet.has_tls and not (broker / "broker.crt").exists():
        (broker / "broker.key").unlink(missing_ok=True)  # a half of one that was never used
        certificates.make_broker(broker, folder, fleet.host)
    if fleet.has_tls:
        _copy(folder / "ca.crt", broker)
    _write(broker / "users.acl", acl.acl_file(fleet.passwords))
    _write(broker / "redis.conf", _redis_conf(fleet))


def _redis_conf(fleet: Fleet) -> str:
    tls = f"""port 0
tls-port {fleet.port}
tls-cert-file {BROKER_PLACE}/broker.crt
tls-key-file {BROKER_PLACE}/broker.key
tls-ca-cert-file {BROKER_PLACE}/ca.crt
tls-auth-clients no
"""
    return f"""# To be included by the settings of Redis, 7 or later, or Valkey.
bind * -::*
{tls if fleet.has_tls else f"port {fleet.port}" + chr(10)}aclfile {BROKER_PLACE}/users.acl
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
client-output-buffer-limit pubsub 64mb 32mb 60
"""


def _write_member(folder: Path, fleet: Fleet, who: str, written: Written) -> None:
    """Settings and key of a host or a user."""
    own, role = folder / who, who.partition("-")[0]
    if not own.exists():
        _private(own)
        written.new.append(own)
    if not (own / f"{who}.key").exists():
        (own / f"{who}.pub").unlink(missing_ok=True)
        make_key(own, who)
    _copy(own / f"{who}.pub", folder / "trusted")
    if role == "host":
        (own / "trusted").mkdir(exist_ok=True, mode=0o755)
    place = HOST_PLACE if role == "host" else USER_PLACE
    lines: dict[str, str | Path] = {
        "broker_url": fleet.url("worker" if role == "host" else "cli"),
        "signing_key": place / f"{who}.key",
    }
    if role == "host":
        lines |= {"host": who.removeprefix("host-"), "trusted_keys": place / "trusted"}
    _write_settings(own, fleet, place, lines)


def _write_flower(folder: Path, fleet: Fleet, written: Written) -> None:
    own = folder / "flower"
    if not own.exists():
        _private(own)
        written.new.append(own)
    _write_settings(own, fleet, FLOWER_PLACE, {"broker_url": fleet.url("flower")})


def _write_settings(own: Path, fleet: Fleet, place: Path, lines: dict[str, str | Path]) -> None:
    if fleet.has_tls:
        lines["broker_ca"] = place / "ca.crt"
        _copy(own.parent / "ca.crt", own)
    text = "".join(f'{name} = "{value}"\n' for name, value in lines.items())
    _write(own / "sandbatch.toml", text)


def _spread(folder: Path, written: Written) -> None:
    """Give each host the public keys of all; whose key was taken away from `trusted` gets no new place."""
    for host in sorted(folder.glob("host-*")):
        for key in sorted((folder / "trusted").glob("*.pub")):
            target = host / "trusted"
            if not (target / key.name).exists() and host not in written.new:
                written.trusted.append(target)
            _copy(key, target)
    written.trusted = sorted(set(written.trusted))


def _private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _copy(file: Path, folder: Path) -> None:
    if not (folder / file.name).exists():
        shutil.copy(file, folder)


def _write(path: Path, text: str, *, anew: bool = False) -> None:
    """A file for whoever runs this alone; one that is there stays, unless it is to be written anew."""
    if path.exists() and not anew:
        return
    # First under another name: a run that is cut off must not leave half a file, which would then stay.
    writing = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    writing.rename(path)
