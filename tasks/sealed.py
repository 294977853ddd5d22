"""What of a spec is no business of whoever may read the record: the values of its environment.

The record's own `spec` has their names alone. The values lie in a key beside it, which clients may write and
only hosts may read, and which goes when the sandbox has ended.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.errors import BadInput
from worker.spec import KINDS, Spec

KIND = KINDS[-1]  # of a spec whose values are elsewhere: a host that does not know it must not take it
MOST_BYTES = 1 << 20  # of a spec with all its values


class Sealed(BaseModel):
    """What lies beside a record."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)

    kind: Literal["sealed/v1"] = "sealed/v1"
    env: dict[str, str] = Field(default_factory=dict)
    token: str | None = None  # who signed the spec (`tasks.signing`); the host judges it


def kind_of(spec: Spec) -> str:
    """Of the spec as the record has it."""
    return KIND if spec.env else spec.kind


def seal(spec: Spec) -> str:
    """The spec as the record has it.

    Raises:
        BadInput: It is too large.
    """
    text = spec.model_dump_json()
    if len(text) > MOST_BYTES:
        raise BadInput("spec", f"it has {len(text)} bytes", f"{MOST_BYTES} are the most: use a mount")
    if not spec.env:
        return text
    fields = json.loads(text)
    fields |= {"kind": KIND, "env": dict.fromkeys(spec.env)}
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def beside(spec: Spec, token: str | None) -> str | None:
    """What is to lie beside a record; None: nothing."""
    return Sealed(env=spec.env, token=token).model_dump_json() if spec.env or token else None


def parts(container_id: str, batch: str, text: str, env: Mapping[str, str]) -> list[str]:
    """What is signed: the spec as the record has it, whichever release wrote it, and its values."""
    return [container_id, batch, text, json.dumps(env, sort_keys=True, separators=(",", ":"))]


def token_of(beside: str | None) -> tuple[str | None, dict[str, str]]:
    """The signature that lies beside a record, if any, and the values.

    Raises:
        BadInput: It is of another release, or of nobody.
    """
    try:
        found = Sealed.model_validate_json(beside) if beside is not None else Sealed()
    except ValidationError as error:
        raise BadInput("spec", words_of(error), "run it again") from None
    return found.token, found.env


def unseal(text: str, beside: str | None) -> Spec:
    """The spec of a record, checked as if nobody had done so before: its words may be anybody's.

    Raises:
        BadInput: It is no spec that this release can launch; with no value of it in the words.
    """
    if len(text) + len(beside or "") > 2 * MOST_BYTES:
        raise BadInput("spec", f"it is larger than {MOST_BYTES} bytes", "use a mount")
    try:
        fields = json.loads(text)
        if isinstance(fields, dict) and fields.get("kind") == KIND:
            if beside is None:
                raise BadInput(
                    "spec", "the values of its environment are not there (any more)", "run it again"
                )
            env = Sealed.model_validate_json(beside).env
            if sorted(env) != sorted(fields.get("env") or {}):
                raise BadInput("spec", "the values of its environment are of another spec", "run it again")
            fields["env"] = env
        return Spec.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise BadInput("spec", words_of(error), "correct it and run again") from None
    except (ValueError, TypeError, RecursionError):
        raise BadInput("spec", "it is no JSON object", "what has written it?") from None


def readable(text: str) -> dict[str, Any]:
    """The spec of a record as anybody may see it; empty where somebody wrote what is none.

    Whoever lists sandboxes, or ends them, must not stumble over one. One of release 0.1.0 has its values in
    the record.
    """
    try:
        fields = json.loads(text)
        for name in ("networks", "labels", "args", "env", "on"):
            given = fields.get(name) or []
            if not isinstance(given, (list if name in ("networks", "args") else dict)) and given:
                return {}
        if not all(isinstance(one["name"], str) for one in fields.get("networks") or []):
            return {}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return {}
    return {**fields, "env": dict.fromkeys(fields["env"])} if fields.get("env") else fields


def needs(text: str) -> tuple[Spec, str]:
    """The spec of a record with its values left empty, to see what it needs; and its kind.

    Raises:
        ValueError: It is of another release.
    """
    fields = json.loads(text)
    kind = fields.get("kind")
    if kind == KIND:
        fields["env"] = dict.fromkeys(fields.get("env") or {}, "")
    spec = Spec.model_validate_json(json.dumps(fields))
    return spec, KIND if kind == KIND else spec.kind


def words_of(error: ValidationError) -> str:
    """What is wrong first, without the value that is: it may be a secret."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    why = re.sub(r"\s+", " ", first["msg"].removeprefix("Value error, "))
    return f"{where[:80]}: {why[:200]}" if where else why[:200]
