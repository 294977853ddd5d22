"""What crosses the wire: names that a host can look up, never contents."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.errors import BadInput
from worker.spec import ContainerId


class Order(BaseModel):
    """Work on one sandbox. A host does nothing for an attempt that is not the journal's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["order/v1"] = "order/v1"  # hosts are upgraded one by one
    container_id: ContainerId
    attempt: int = Field(ge=1)


def read_order(message: Any) -> Order:
    """Check a message of the queue, which anybody with the broker's password can write.

    Raises:
        BadInput: It is no order of a version that this release knows.
    """
    try:
        return Order.model_validate(message)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            "message", f"{first['loc']}: {first['msg']}", "its sender is of another release"
        ) from None
