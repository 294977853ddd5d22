"""Batch files in JSON, and in JSON Lines."""

import json
import re
from bisect import bisect_left
from typing import Any

from cli.batch_text import Document, Item, Reader


class _Twice(Exception):
    """A key that stands twice in one object, where the second would win in silence."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise _Twice(key)
        made[key] = ("false", "true")[value] if isinstance(value, bool) else value
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=str)
_SKIP = json.JSONDecoder(parse_int=str, parse_float=str)  # Python refuses integers of thousands of digits
_SPACE = re.compile(r"[ \t\n\r]*")


class Json(Reader):
    """JSON. A place is an offset."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        _SKIP.decode(text)  # so that it is well-formed in what follows
        self.newlines = [found.start() for found in re.finditer("\n", text)]

    def top(self) -> int:
        return self.skip(0)

    def skip(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        return found.end() if found else at

    def kind(self, place: int) -> str:
        return {"[": "list", "{": "mapping"}.get(self.text[place], "text")

    def line(self, place: int) -> int:
        return bisect_left(self.newlines, place) + 1

    def elements(self, place: int) -> list[int]:
        found, at = [], self.skip(place + 1)
        while self.text[at] != "]":
            found.append(at)
            at = self.after(at)
        return found

    def pairs(self, place: int) -> list[tuple[str, int, int]]:
        found: dict[str, tuple[str, int, int]] = {}
        at = self.skip(place + 1)
        while self.text[at] != "}":
            key, end = _SKIP.raw_decode(self.text, at)
            value = self.skip(self.skip(end) + 1)  # behind the colon
            if key in found:
                self.twice(self.line(at), key)
            found.setdefault(key, (key, self.line(at), value))
            at = self.after(value)
        return list(found.values())

    def after(self, at: int) -> int:
        """Where the next one begins, or the bracket is closed."""
        end = self.skip(_SKIP.raw_decode(self.text, at)[1])
        return self.skip(end + 1) if self.text[end] == "," else end

    def value(self, place: int, word: str) -> Any:
        try:
            found, _ = _DECODER.raw_decode(self.text, place)
        except _Twice as error:
            self.twice(self.line(place), f"{word}.{error}")
            return None
        return ("false", "true")[found] if isinstance(found, bool) else found


def read_lines(text: str) -> Document:
    """JSON Lines: each line a spec, and no plan."""
    document = Document()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = _DECODER.decode(line)
        except _Twice as error:
            document.problem(number, str(error), "it is given twice", "leave one of them")
        except json.JSONDecodeError as error:
            why = f"no JSON: {error.msg} at character {error.colno}"
            document.problem(number, "spec", why, "each line is one JSON object")
        else:
            if isinstance(found, dict):
                document.specs.append(Item(found, number))
            else:
                document.problem(number, "spec", "it is no JSON object", "each line is one JSON object")
    return document
