"""JSON of CNI files as libcni reads it, with the line of each key for the errors."""

import json
import math
from typing import Any

from worker.errors import BadNetwork

SPACES = " \t\n\r"
GO_EXPONENT_FROM = 1e21
DECODER = json.JSONDecoder()
KeyPath = tuple[str | int, ...]  # ("plugins", 1, "type"): the way to a value from the top of the document


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The object that a CNI file holds.

    Raises:
        BadNetwork: It is no JSON, or no object; names `where` and the line.
    """
    try:
        document = loads(raw.decode("utf-8", "replace"))  # as Go does with bytes that are no UTF-8
    except json.JSONDecodeError as error:
        raise BadNetwork(where, f"line {error.lineno}: {error.msg}", "correct or remove it") from None
    except RecursionError:
        raise BadNetwork(where, "nested too deeply", "correct or remove it") from None
    except ValueError as error:
        raise BadNetwork(where, str(error), "correct or remove it") from None
    if not isinstance(document, dict):
        raise BadNetwork(where, "line 1: a JSON object is needed", "correct or remove it")
    return document


def loads(text: str) -> Any:
    """As `json.loads`, without what Python takes and Go does not (NaN, Infinity, 1e999).

    Raises:
        ValueError: It is no JSON.
    """
    return json.loads(text, parse_constant=_refuse_number, parse_float=_number)


def dumps(document: dict[str, Any]) -> bytes:
    """Byte for byte what Go's json.Marshal makes of a map: sorted keys, no spaces, no characters of HTML."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()  # half a pair: U+FFFD


def bad_key(raw: bytes, where: str, path: KeyPath, why: str, todo: str) -> BadNetwork:
    """The error of a wrong or missing key; its line is that of the key, else of the object that lacks it."""
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return BadNetwork(where, f"line {_line_of(raw.decode('utf-8', 'replace'), path)}: key {key}: {why}", todo)


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _number(text: str) -> float:
    """1500.0 and 1e3 are handed on as Go writes them, 1500 and 1000: an integer of Go takes nothing else."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return int(number) if number.is_integer() and abs(number) < GO_EXPONENT_FROM else number


def _line_of(text: str, path: KeyPath) -> int:
    """`text` is known to be JSON."""
    at = last = _skip(text, 0)
    for step in path:
        found = _enter(text, at, step)
        if found is None:
            break
        last, at = found
    return text.count("\n", 0, last) + 1


def _enter(text: str, at: int, step: str | int) -> tuple[int, int] | None:
    """Where the member `step` of the object or array at `at` begins: its key, its value."""
    is_object, number, found = text[at] == "{", 0, None
    if text[at] not in "{[":
        return None
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        begin, name = at, ""
        if is_object:
            name, at = DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # over the colon
        if step == (name if is_object else number):
            found = (begin, at)
        _, at = DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
        number += 1
    return found


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in SPACES:
        at += 1
    return at
