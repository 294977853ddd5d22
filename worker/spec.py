"""What the user asked for, checked before it is enqueued and again on the host."""

import re
import secrets
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from worker.errors import BadInput

CONTAINER_ID = re.compile(r"^sb-[0-9a-f]{16}$")  # one length: runsc matches ids by prefix
HOST_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,62}$")
NETWORK_NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
READY = re.compile(r"^(?:none|tcp:(?P<tcp>[0-9]{1,5})|http:(?P<http>[0-9]{1,5})(?P<path>/[\x21-\x7e]*))$")


def new_container_id() -> str:
    return "sb-" + secrets.token_hex(8)


def _container_id(value: str) -> str:
    if not CONTAINER_ID.fullmatch(value):
        raise ValueError("an id is 'sb-' and 16 lowercase hexadecimal digits")
    return value


def _text(value: str) -> str:
    """What JSON and the kernel can take; an argument of the command line may be neither."""
    if "\0" in value:
        raise ValueError("a NUL character is not allowed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("it is no UTF-8")
    return value


def _command(value: list[str]) -> list[str]:
    if not value or not value[0]:
        raise ValueError("the command is empty, one is needed after --")
    return value


def _clean_path(value: str) -> str:
    if not value.startswith("/") or ".." in PurePosixPath(value).parts:
        raise ValueError("an absolute path without '..' is needed")
    return _text(value)


def host_name(value: str) -> str:
    """The name, if it can be one of a host, and of its queue."""
    if not HOST_NAME.fullmatch(value):
        raise ValueError("a host name has letters, digits, '-', '_', '.', at most 63")
    return value


def _ready(value: str) -> str:
    match = READY.fullmatch(value)
    port = match and (match["tcp"] or match["http"])
    if not match or (port and not 1 <= int(port) <= 65535):
        raise ValueError("'none', 'tcp:PORT' or 'http:PORT/PATH' is needed, PORT from 1 to 65535")
    return value


def _rootfs(value: str) -> str:
    return value if value == "host" else _clean_path(value)


def _network(value: str) -> str:
    if not NETWORK_NAME.fullmatch(value):
        raise ValueError(
            "a network name has letters, digits, '_', '.', '-', and begins with a letter or digit"
        )
    return value


def _env(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
        _text(text)
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for part in (*value, *value.values()):
        _text(part)
    return value


ContainerId = Annotated[str, AfterValidator(_container_id)]


class Spec(BaseModel):
    """One sandbox as asked for. Names that a host can look up, never contents."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["spec/v1"] = "spec/v1"  # hosts are upgraded one by one
    args: Annotated[list[Annotated[str, AfterValidator(_text)]], AfterValidator(_command)]
    rootfs: Annotated[str, AfterValidator(_rootfs)] = "host"
    network: Annotated[str, AfterValidator(_network)] = "sandbatch"
    host: Annotated[str, AfterValidator(host_name)] | None = None
    env: Annotated[dict[str, str], AfterValidator(_env)] = Field(default_factory=dict)
    cwd: Annotated[str, AfterValidator(_clean_path)] = "/"
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = Field(default_factory=dict)
    ready: Annotated[str, AfterValidator(_ready)] = "none"
    ready_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0


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
        why = first["msg"].removeprefix("Value error, ")
        given = first.get("input")
        if isinstance(
            given, (dict, list)
        ):  # all of it: the error speaks of one part, another may be a secret
            raise BadInput(field, why, "correct it and run again") from None
        raise BadInput(field, f"{given!r}: {why}", "correct it and run again") from None
