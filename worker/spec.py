"""What the user asked for, checked before it is enqueued and again on the host."""

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from worker.errors import BadInput
from worker.image_ref import parse_image
from worker.spec_parts import (
    MOST_NETWORKS,
    NETWORK_NAME,
    NUMBERS,
    RESTART,
    Bandwidth,
    Mount,
    NetworkRequest,
    Publish,
    address,
    clean_path,
    dns_name,
    egress_rule,
    host_labels,
    restart_policy,
    signal_name,
    stamp,
    text,
    user_words,
)

__all__ = ["CONTAINER_ID", "HOST_NAME", "NETWORK_NAME", "READY", "ContainerId", "Spec", "make_spec"]

CONTAINER_ID = re.compile(r"^sb-[0-9a-f]{16}$")  # one length: runsc matches ids by prefix
HOST_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,62}$")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
READY = re.compile(r"^(?:none|tcp:(?P<tcp>[0-9]{1,5})|http:(?P<http>[0-9]{1,5})(?P<path>/[\x21-\x7e]*))$")
# Fields that hosts of an older release forbid: a spec that has one is of the kind that knows it.
YOUNGER = {
    **dict.fromkeys(("on", "reschedule"), "spec/v2"),
    **dict.fromkeys(("image", "pull", "entrypoint", "user", "groups", "stop_signal"), "spec/v3"),
}
# That this release can launch. The last is of any spec in the record with an environment (`tasks.sealed`).
KINDS = ("spec/v1", "spec/v2", "spec/v3", "spec/v4")
OF_IMAGE = "image"  # `ready`: what the image says
MOST_ID = 2**32 - 2


def new_container_id() -> str:
    return "sb-" + secrets.token_hex(8)


def _container_id(value: str) -> str:
    if not CONTAINER_ID.fullmatch(value):
        raise ValueError("an id is 'sb-' and 16 lowercase hexadecimal digits")
    return value


def command(value: list[str]) -> list[str]:
    if not value or not value[0]:
        raise ValueError("the command is empty, one is needed after --")
    return value


def _command(value: list[str], info: ValidationInfo) -> list[str]:
    """An image may know one itself."""
    return value if info.data.get("image", True) else command(value)


def _image(value: str) -> str:
    return str(parse_image(value))


def _cwd(value: str, info: ValidationInfo) -> str:
    return value if not value and info.data.get("image", True) else clean_path(value)


def _user(value: str, info: ValidationInfo) -> str:
    if value and not NUMBERS.fullmatch(value) and not info.data.get("image", True):
        raise ValueError("numbers are needed, UID[:GID]: names are looked up in an image")
    if any(int(part) > MOST_ID for part in user_words(value).split(":") if part.isdigit()):
        raise ValueError(f"a number is {MOST_ID} at most")
    return value


def host_name(value: str) -> str:
    """The name, if it can be one of a host, and of its queue."""
    if not HOST_NAME.fullmatch(value):
        raise ValueError("a host name has letters, digits, '-', '_', '.', at most 63")
    return value


def _ready(value: str, info: ValidationInfo) -> str:
    if value == OF_IMAGE and info.data.get("image", True):
        return value
    match = READY.fullmatch(value)
    port = match and (match["tcp"] or match["http"])
    if not match or (port and not 1 <= int(port) <= 65535):
        raise ValueError("'none', 'tcp:PORT' or 'http:PORT/PATH' is needed, PORT from 1 to 65535")
    return value


def _rootfs(value: str) -> str:
    return value if value == "host" else clean_path(value)


def environment(value: dict[str, str]) -> dict[str, str]:
    for name, given in value.items():
        if not ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
        text(given)
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for part in (*value, *value.values()):
        text(part)
    return value


def _hosts(value: dict[str, str]) -> dict[str, str]:
    return {dns_name(name): address(ip) for name, ip in value.items()}


ContainerId = Annotated[str, AfterValidator(_container_id)]


class Spec(BaseModel):
    """One sandbox as asked for. Names that a host can look up, never contents."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, defer_build=True, hide_input_in_errors=True
    )

    kind: Literal["spec/v1", "spec/v2", "spec/v3", "spec/v4"] = "spec/v1"  # hosts are upgraded one by one

    # Its programs: an image, whose config says what is not said here, or a rootfs.
    image: Annotated[str, AfterValidator(_image)] | None = None
    pull: Literal["missing", "always", "never"] = "missing"
    args: Annotated[list[Annotated[str, AfterValidator(text)]], AfterValidator(_command)]
    entrypoint: list[Annotated[str, AfterValidator(text)]] | None = None  # [] takes the image's away
    user: Annotated[str, AfterValidator(_user)] = ""
    groups: list[Annotated[int, Field(ge=0, le=MOST_ID)]] = Field(default_factory=list, max_length=64)
    stop_signal: Annotated[str, AfterValidator(signal_name)] | None = None  # None: TERM
    rootfs: Annotated[str, AfterValidator(_rootfs)] = "host"
    networks: list[NetworkRequest] = Field(
        default_factory=lambda: [NetworkRequest(name="sandbatch")], min_length=1, max_length=MOST_NETWORKS
    )
    host: Annotated[str, AfterValidator(host_name)] | None = None
    on: Annotated[dict[str, str], AfterValidator(host_labels)] = Field(
        default_factory=dict
    )  # a host's labels
    reschedule: bool = False  # launched elsewhere, under a new id, if its host is lost
    env: Annotated[dict[str, str], AfterValidator(environment)] = Field(default_factory=dict)
    cwd: Annotated[str, AfterValidator(_cwd)] = "/"  # "": that of the image
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = Field(default_factory=dict)
    ready: Annotated[str, AfterValidator(_ready)] = "none"
    ready_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0

    # Limits; None: the host's default.
    memory_bytes: int | None = Field(default=None, gt=0, le=2**50)
    cpus: float | None = Field(default=None, ge=0.01, le=4096)
    pids: int | None = Field(default=None, ge=1, le=2**22)

    # Its end.
    ttl_s: float | None = Field(default=None, gt=0, le=10**9)  # from running
    deadline_at: Annotated[str, AfterValidator(stamp)] | None = None  # whatever it does by then
    stop_grace_s: float = Field(default=10.0, ge=0, le=3600)  # between TERM and KILL
    restart: Annotated[str, AfterValidator(restart_policy)] = "no"
    keep_s: float | None = Field(default=None, ge=0, le=10**9)  # its log; None: the host's default
    remove: bool = False  # forget it, and its log, once it has ended

    # Network.
    publish: list[Publish] = Field(default_factory=list, max_length=256)
    bandwidth: Bandwidth | None = None
    dns: list[Annotated[str, AfterValidator(address)]] = Field(default_factory=list, max_length=3)
    dns_search: list[Annotated[str, AfterValidator(dns_name)]] = Field(default_factory=list, max_length=6)
    hosts: Annotated[dict[str, str], AfterValidator(_hosts)] = Field(default_factory=dict)  # name -> address
    egress: list[Annotated[str, AfterValidator(egress_rule)]] | None = Field(default=None, max_length=256)
    isolate: bool = False  # apart from the other sandboxes of its networks

    # Files.
    mounts: list[Mount] = Field(default_factory=list, max_length=64)
    writable: Literal["no", "memory", "disk"] = "no"  # the root, through gVisor's overlay
    writable_bytes: int | None = Field(default=None, ge=2**20)

    @model_validator(mode="before")
    @classmethod
    def _one_network(cls, value: Any) -> Any:
        """`network: NAME` is short for the list of one, and what the release before wrote."""
        if isinstance(value, dict) and "network" in value:
            if "networks" in value:
                raise ValueError("network and networks are the same: give one of them")
            value = {**value, "networks": [{"name": value["network"]}]}
            del value["network"]
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_the_image_says(cls, value: Any) -> Any:
        """With an image, silence means its config; and a root to write to, as with docker."""
        if isinstance(value, dict) and value.get("image") is not None:
            value = {"args": [], "cwd": "", "ready": OF_IMAGE, "writable": "memory", **value}
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Spec":
        if self.image is not None and self.rootfs != "host":
            raise ValueError("image and rootfs: a sandbox has one of them")
        if self.image is None:
            for name in ("entrypoint", "pull"):
                if getattr(self, name) not in (None, "missing"):
                    raise ValueError(f"{name}: is about an image, and none is named")
        names = [one.name for one in self.networks]
        if len(set(names)) != len(names):
            raise ValueError("networks: one of them is named twice")
        targets = [one.target.rstrip("/") for one in self.mounts]
        if len(set(targets)) != len(targets):
            raise ValueError("mounts: two have the same target")
        if self.writable_bytes is not None and self.writable == "no":
            raise ValueError("writable_bytes: the root is not writable: say memory or disk as well")
        taken = [(one.host_ip, one.host_port, one.protocol) for one in self.publish if one.host_port]
        if len(set(taken)) != len(taken):
            raise ValueError("publish: a port of the host is named twice")
        return self

    @model_validator(mode="after")
    def _is_of_the_least_kind(self) -> "Spec":
        """The oldest that it can be, so that as many hosts as possible can launch it."""
        asked = [kind for name, kind in YOUNGER.items() if self._is_asked_for(name)]
        self.__dict__["kind"] = max(asked, default=KINDS[0])
        return self

    def _is_asked_for(self, name: str) -> bool:
        if name == "pull":  # says nothing without an image, which asks for the same kind
            return self.image is not None
        value = getattr(self, name)
        return value is not None if name in ("image", "entrypoint", "stop_signal") else bool(value)

    @model_serializer(mode="wrap")
    def _without_what_nobody_asked_for(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a host of the release before can read the spec: in the record, and in its own journal."""
        made: dict[str, Any] = as_usual(self)
        for name in YOUNGER:
            if not self._is_asked_for(name):
                made.pop(name, None)
        return made

    @property
    def network(self) -> str:
        """The network of `eth0`."""
        return self.networks[0].name

    @property
    def max_restarts(self) -> int | None:
        """How often it may be started anew after it failed; None: without a limit."""
        match = RESTART.fullmatch(self.restart)
        if match is None or self.restart == "no":
            return 0
        return int(match["max"]) if match["max"] else None


def make_spec(**fields: Any) -> Spec:
    """Check the fields and make the spec.

    Raises:
        BadInput: Names the first wrong field, its value and what is allowed.
    """
    try:
        return Spec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "spec"
        field = "network" if field == "networks.0.name" else field
        why = first["msg"].removeprefix("Value error, ")
        given = first.get("input")
        if isinstance(
            given, (dict, list)
        ):  # all of it: the error speaks of one part, another may be a secret
            raise BadInput(field, why, "correct it and run again") from None
        raise BadInput(field, f"{given!r}: {why}", "correct it and run again") from None
