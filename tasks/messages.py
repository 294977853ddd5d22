"""What crosses the wire: names that a host can look up, never contents."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.errors import BadInput
from worker.spec import ContainerId

RELEASE = "0.2.0"  # of pyproject.toml; a host says it, and a message that it could not read keeps it


AnyOrder = TypeVar("AnyOrder", bound=BaseModel)


class Order(BaseModel):
    """Work on one sandbox. A host does nothing for an attempt that is not the journal's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["order/v1"] = "order/v1"  # hosts are upgraded one by one
    container_id: ContainerId
    attempt: int = Field(ge=1)


class PullOrder(BaseModel):
    """The word to a host that the record has an order of `sandbatch pull` for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pull/v1"] = "pull/v1"
    pull_id: str = Field(pattern=r"^pull-[0-9a-f]{16}$")


class Words(BaseModel):
    """What a task is told besides its order; each task takes some of these."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    final: Literal["exited", "failed", "cancelled"] = "cancelled"
    forget: bool = False
    reason: str = Field("", pattern=r"^[a-z_]{0,40}$")
    grace_s: float | None = Field(None, ge=0, le=10**9)
    outcome: str = Field("", pattern=r"^[a-z_]{0,40}$")
    detail: str = Field("", max_length=100_000)
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    is_admitted: bool = False


def read_order(message: Any) -> Order:
    """Check a message of the queue, which anybody with the broker's password can write.

    Raises:
        BadInput: It is no order of a version that this release knows.
    """
    return _read(Order, message)


def read_pull_order(message: Any) -> PullOrder:
    """The same, of an order to pull.

    Raises:
        BadInput: As `read_order`.
    """
    return _read(PullOrder, message)


def read_words(words: dict[str, Any]) -> Words:
    """Check what a task is told besides.

    Raises:
        BadInput: As `read_order`.
    """
    return _read(Words, words)


def _read(model: type[AnyOrder], message: Any) -> AnyOrder:
    try:
        return model.model_validate(message)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        words = f"{where} {str(first.get('input'))[:80]!r}: {first['msg']}" if where else first["msg"]
        raise BadInput("message", words, "its sender is of another release") from None
