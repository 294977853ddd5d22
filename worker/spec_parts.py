"""The parts of a spec: what a sandbox may ask of networks, ports, mounts, limits and its end."""

import ipaddress
import math
import re
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NETWORK_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$")
MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")
DNS_NAME = re.compile(
    r"^(?=.{1,253}$)[a-zA-Z0-9_]([a-zA-Z0-9_\-]{0,62})(\.[a-zA-Z0-9_][a-zA-Z0-9_\-]{0,62})*\.?$"
)
RESTART = re.compile(r"^(?:no|on-failure(?::(?P<max>[1-9][0-9]{0,3}))?)$")
EGRESS = re.compile(
    r"^(?P<cidr>\[[0-9a-fA-F:.]+(?:/\d{1,3})?\](?:/\d{1,3})?|[0-9.]+(?:/\d{1,2})?)"
    r"(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?(?:/(?P<protocol>tcp|udp))?$"
)
HOST_LABEL = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_./\-]{0,62}$")  # no '=' and ',': they are written K=V,K=V
MOST_NETWORKS = 8
MOST_HOST_LABELS = 64
NAME_OR_NUMBER = r"(?:[0-9]{1,10}|[a-zA-Z_][a-zA-Z0-9_.\-]{0,63}\$?)"
USER = re.compile(rf"{NAME_OR_NUMBER}(?::{NAME_OR_NUMBER})?")
NUMBERS = re.compile(r"[0-9]{1,10}(?::[0-9]{1,10})?")
REAL_TIME = re.compile(r"(?:SIG)?RT(?P<end>MIN|MAX)(?:[+-](?P<offset>[0-9]{1,2}))?")
KERNELS_OWN = ("proc", "sys", "dev")  # gVisor's own there; a mount over them would break the sandbox

SIZE = re.compile(r"^(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[kmgt]?)(?:i?b)?$", re.IGNORECASE)
UNITS = ("", "k", "m", "g", "t")

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def text(value: str) -> str:
    """What JSON and the kernel can take; an argument of the command line may be neither."""
    if "\0" in value:
        raise ValueError("a NUL character is not allowed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("it is no UTF-8")
    return value


def size(value: str) -> int:
    """Bytes; `512m` counts by 1024, as docker does."""
    match = SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("a size is needed, such as 512m or 2g")
    return whole(float(match["number"]) * 1024 ** UNITS.index(match["unit"].lower()))


def whole(number: float) -> int:
    """The integer; of hundreds of digits a float makes infinity, which has none."""
    if math.isinf(number):
        raise ValueError("the number is too large")
    return int(number)


def signal_name(value: str) -> str:
    """A signal as `SIGINT`, whether written so, as `int`, or as a number; one of real time as its number."""
    name = value.strip().upper()
    if match := REAL_TIME.fullmatch(name):
        first, offset = (signal.SIGRTMIN, 1) if match["end"] == "MIN" else (signal.SIGRTMAX, -1)
        name = str(first + offset * int(match["offset"] or 0))
    with suppress(ValueError, KeyError):
        number = (
            int(name)
            if name.isascii() and name.isdigit()
            else signal.Signals[f"SIG{name.removeprefix('SIG')}"]
        )
        if 1 <= number <= signal.SIGRTMAX:
            is_named = number < signal.SIGRTMIN
            return signal.Signals(number).name if is_named else str(int(number))
    raise ValueError("a signal is needed, such as SIGINT or 2")


def user_words(value: str) -> str:
    """`USER[:GROUP]`, each a number or a name; of the image that the sandbox has."""
    if value and not USER.fullmatch(value):
        raise ValueError("USER[:GROUP] is needed, each a name or a number")
    return value


def clean_path(value: str) -> str:
    if not value.startswith("/") or ".." in PurePosixPath(value).parts:
        raise ValueError("an absolute path without '..' is needed")
    return text(value)


def plain_path(value: str) -> str:
    """An absolute path without `.`, `..`, doubled and closing slashes."""
    return "/" + "/".join(PurePosixPath(clean_path(value)).parts[1:])


def _mount_target(value: str) -> str:
    path = PurePosixPath(plain_path(value))
    if path == PurePosixPath("/"):
        raise ValueError("nothing can be mounted over /")
    if path.parts[1] in KERNELS_OWN and str(path) != "/dev/shm":  # noqa: S108 - the sandbox's own
        raise ValueError("nothing can be mounted on /proc, /sys or /dev, except on /dev/shm")
    return str(path)


def network_name(value: str) -> str:
    if not NETWORK_NAME.fullmatch(value):
        raise ValueError(
            "a network name has letters, digits, '_', '.', '-', and begins with a letter or digit"
        )
    return value


def address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address is needed, without a prefix length") from None


def _own_address(value: str) -> str:
    """With the prefix length where one is given: `static` needs it, host-local knows its own."""
    ip, slash, length = value.partition("/")
    if not slash:
        return address(value)
    try:
        return str(ipaddress.ip_interface(f"{address(ip)}/{length}"))
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address is needed") from None


def _mac(value: str) -> str:
    value = value.lower()
    if not MAC.fullmatch(value) or int(value[:2], 16) & 1:
        raise ValueError("a MAC address of one machine is needed, such as 02:00:00:00:00:01")
    return value


def dns_name(value: str) -> str:
    if not DNS_NAME.fullmatch(value):
        raise ValueError("a host name is needed: letters, digits, '-', '_', '.'")
    return value


def host_labels(value: dict[str, str]) -> dict[str, str]:
    """The labels, if a host can have them; a value may be empty."""
    if len(value) > MOST_HOST_LABELS:
        raise ValueError(f"at most {MOST_HOST_LABELS} labels are allowed")
    for part in (*value, *filter(None, value.values())):
        if not HOST_LABEL.fullmatch(part):
            raise ValueError(
                f"{part!r} is no label: at most 63 letters, digits, '-', '_', '.', '/', no sign first"
            )
    return value


def restart_policy(value: str) -> str:
    if not RESTART.fullmatch(value):
        raise ValueError("'no', 'on-failure' or 'on-failure:N' is needed, N the most restarts")
    return value


def stamp(value: str) -> str:
    """A moment, RFC 3339 with its zone."""
    try:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError
    except ValueError:
        raise ValueError("a time is needed with its zone, such as 2027-01-31T12:00:00Z") from None
    return value


class Part(BaseModel):
    """What all parts are: frozen, and nothing unknown in them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class NetworkRequest(Part):
    """One network to be on; `ips`, `mac` and `aliases` go to plugins that advertise the capability."""

    name: Annotated[str, AfterValidator(network_name)]
    ips: list[Annotated[str, AfterValidator(_own_address)]] = Field(default_factory=list, max_length=2)
    mac: Annotated[str, AfterValidator(_mac)] | None = None
    aliases: list[Annotated[str, AfterValidator(dns_name)]] = Field(default_factory=list, max_length=16)


class Publish(Part):
    """A port of the sandbox on an address of the host; host port 0: the host chooses a free one."""

    port: int = Field(ge=1, le=65535)
    host_port: int = Field(default=0, ge=0, le=65535)
    host_ip: Annotated[str, AfterValidator(address)] | None = None  # None: every address of the host
    protocol: Literal["tcp", "udp", "sctp"] = "tcp"


class Bandwidth(Part):
    """Rates in bits a second and bursts in bits, seen from the sandbox, for the bandwidth plugin."""

    ingress_rate: int | None = Field(default=None, ge=8_000, le=10**12)
    ingress_burst: int | None = Field(default=None, ge=8_000, le=2**32)
    egress_rate: int | None = Field(default=None, ge=8_000, le=10**12)
    egress_burst: int | None = Field(default=None, ge=8_000, le=2**32)

    @model_validator(mode="after")
    def _bursts_have_rates(self) -> "Bandwidth":
        for way in ("ingress", "egress"):
            if getattr(self, f"{way}_burst") and not getattr(self, f"{way}_rate"):
                raise ValueError(f"{way}_burst needs {way}_rate")
        return self


class Mount(Part):
    """A read-only bind of a host folder or file, or a tmpfs of its own."""

    type: Literal["bind", "tmpfs"]
    target: Annotated[str, AfterValidator(_mount_target)]
    source: Annotated[str, AfterValidator(plain_path)] | None = None
    size_bytes: int | None = Field(default=None, ge=4096)

    @model_validator(mode="after")
    def _fits_its_type(self) -> "Mount":
        if (self.type == "bind") != (self.source is not None):
            raise ValueError("a bind needs a source, a tmpfs has none")
        if self.type == "bind" and self.size_bytes is not None:
            raise ValueError("a bind has no size")
        if self.type == "bind" and self.target == "/dev/shm":  # noqa: S108 - the sandbox's own
            raise ValueError("nothing can be bound on /proc, /sys or /dev")
        return self


def egress_rule(value: str) -> str:
    """`CIDR[:PORT[-PORT]][/tcp|udp]`, IPv6 in brackets; without a port every protocol is meant."""
    parse_egress(value)
    return value


def parse_egress(value: str) -> tuple[IpNetwork, tuple[int, int] | None, str]:
    """Network, ports (first, last; None for all), protocol ("tcp", "udp", or "" for all).

    Raises:
        ValueError: It is no such rule.
    """
    match = EGRESS.fullmatch(value)
    if match is None:
        raise ValueError("CIDR[:PORT[-PORT]][/tcp|udp] is needed, such as 10.0.0.0/8:443, [fd00::/8]:53/udp")
    try:
        network = ipaddress.ip_network(match["cidr"].replace("[", "").replace("]", ""))
    except ValueError as error:
        raise ValueError(str(error)) from None
    if match["first"] is None:
        return network, None, match["protocol"] or ""
    first = int(match["first"])
    last = int(match["last"] or first)
    if not 1 <= first <= last <= 65535:
        raise ValueError("ports are numbers from 1 to 65535, the lower one first")
    return network, (first, last), match["protocol"] or "tcp"
