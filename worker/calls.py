"""What a client may ask a host for in a conversation, checked by the client and again on the host."""

from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from worker.errors import BadInput
from worker.spec import ContainerId, command, environment
from worker.spec_parts import text, user_words

CURSOR_MOST = 200
Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")


def _words(value: list[str]) -> list[str]:
    if any("\0" in word for word in command(value)):
        raise ValueError("a NUL character cannot be handed over")
    return value


class _Call(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["call/v1"] = "call/v1"  # hosts are upgraded one by one
    call_id: str = Field(pattern=r"^[0-9a-f]{32}$")

    @property
    def about(self) -> str:
        """What it is about, for a log."""
        return "the host"


class _SandboxCall(_Call):
    container_id: ContainerId

    @property
    def about(self) -> str:
        return self.container_id


class LogsCall(_SandboxCall):
    """A sandbox's log, from a place in it on; with `follow`, until the sandbox has ended."""

    verb: Literal["logs"] = "logs"
    follow: bool = False
    tail: int | None = Field(default=None, ge=0, le=10**9)  # lines
    since_s: float | None = Field(default=None, ge=0, le=10**10)  # by the host's clock, which stamps lines
    since_at: float | None = Field(default=None, ge=0, le=10**11)  # seconds since the epoch
    timestamps: bool = False
    streams: tuple[Stream, ...] = STREAMS
    cursor: str = Field(default="", max_length=CURSOR_MOST)  # go on where an earlier call stopped


class ExecCall(_SandboxCall):
    """One more command in a running sandbox. What is not given is as for the sandbox's own command."""

    verb: Literal["exec"] = "exec"
    args: Annotated[list[str], Field(max_length=10_000), AfterValidator(_words)]
    env: Annotated[dict[str, str], Field(max_length=1000), AfterValidator(environment)] = Field(
        default_factory=dict
    )
    cwd: Annotated[str, Field(max_length=4096), AfterValidator(text)] = ""
    user: Annotated[str, Field(max_length=200), AfterValidator(user_words)] = ""
    stdin: bool = False
    timeout_s: float | None = Field(default=None, gt=0, le=10**9)
    output_limit: int | None = Field(default=None, ge=1)  # bytes, both streams together


class ImagesCall(_Call):
    """The images of a host. Hosts that know images say so: "spec/v3" is among their `kinds`."""

    verb: Literal["images"] = "images"


class ImageRemoveCall(_Call):
    """One image less on a host, with all its references."""

    verb: Literal["image-rm"] = "image-rm"
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class ImagePruneCall(_Call):
    """All images of a host less that no sandbox uses, nor has used for so long."""

    verb: Literal["image-prune"] = "image-prune"
    older_than_s: float = Field(default=0.0, ge=0, le=10**10)


ImageCall = ImagesCall | ImageRemoveCall | ImagePruneCall
Call = LogsCall | ExecCall | ImageCall
_ADAPTER: TypeAdapter[Call] = TypeAdapter(Annotated[Call, Field(discriminator="verb")])


def read_call(raw: str | bytes) -> Call:
    """Check a call as it came over the wire.

    Raises:
        BadInput: It is no call of a version that this release knows.
    """
    try:
        return _ADAPTER.validate_json(raw)
    except ValidationError as error:
        raise _bad(error, "call") from None


def make_call(verb: str, **fields: Any) -> Call:
    """Make a call of what a user asked for.

    Raises:
        BadInput: Names the first wrong field and what is allowed.
    """
    try:
        return _ADAPTER.validate_python({"verb": verb, **fields})
    except ValidationError as error:
        raise _bad(error, verb) from None


def _bad(error: ValidationError, what: str) -> BadInput:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    words = first["msg"].removeprefix("Value error, ")
    return BadInput(what, f"{field}: {words}" if field else words, "correct it and run again")


class Talk(Protocol):
    """The host's end of one conversation, as a handler has it."""

    async def output(self, stream: str, data: bytes, cursor: str = "") -> None:
        """Send what was read; waits while the client is behind."""

    async def note(self, words: str) -> None:
        """Words for the person at the other end."""

    async def input(self) -> bytes | None:
        """The next part of the client's standard input; None at its end."""

    async def took(self, count: int) -> None:
        """So many bytes of the input have been passed on."""
