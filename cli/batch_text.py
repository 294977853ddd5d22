"""A batch file's text as mappings whose words know their lines, whatever its format.

Scalars stay text, whatever YAML makes of them: `on` and `no` are no bool and `8080:80` no number here.
What a word means, the word itself decides (`cli.words`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LINES_NAMED = 50  # of those that have the same wrong
SHAPE = "a list of specs is needed, or a mapping with `specs`"


class Problem(NamedTuple):
    """What is wrong with a line, or with several."""

    line: int
    what: str
    why: str
    todo: str
    others: tuple[int, ...] = ()

    def words(self, file: str) -> str:
        lines = [self.line, *self.others]
        where = ", ".join(map(str, lines[:LINES_NAMED]))
        more = f" and {len(lines) - LINES_NAMED} more" if len(lines) > LINES_NAMED else ""
        return f"{file} line{'s' if self.others else ''} {where}{more}: {self.what}: {self.why}; {self.todo}"


@dataclass(frozen=True)
class Item:
    """A mapping of the file, and the line of each word in it."""

    words: dict[str, Any] = field(default_factory=dict)
    line: int = 1
    lines: dict[str, int] = field(default_factory=dict)

    def line_of(self, word: str) -> int:
        return self.lines.get(word, self.line)


@dataclass
class Document:
    """A batch file as it is written."""

    plan: Item = field(default_factory=Item)
    defaults: Item = field(default_factory=Item)
    specs: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, line: int, what: str, why: str, todo: str) -> None:
        self.problems.append(Problem(line, what, why, todo))


class Reader(ABC):
    """The shape of a document. A place is where a value stands in the text, before it is read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.document = Document()

    def read(self) -> Document:
        top, document = self.top(), self.document
        if self.kind(top) == "list":
            document.specs = self.items(top)
        elif self.kind(top) == "mapping":
            pairs = {key: (line, place) for key, line, place in self.pairs(top)}
            if (defaults := pairs.pop("defaults", None)) is not None:
                document.defaults = self.item(defaults[1], "defaults") or document.defaults
            if (specs := pairs.pop("specs", None)) is None:
                document.problem(self.line(top), "specs", "there are none", SHAPE)
            elif self.kind(specs[1]) != "list":
                document.problem(specs[0], "specs", "it is no list", SHAPE)
            else:
                document.specs = self.items(specs[1])
            words = {key: self.value(place, key) for key, (_, place) in pairs.items()}
            document.plan = Item(words, self.line(top), {key: line for key, (line, _) in pairs.items()})
        else:
            document.problem(self.line(top), "specs", "there are none", SHAPE)
        return document

    def items(self, place: Any) -> list[Item]:
        found = (self.item(one, "spec") for one in self.elements(place))
        return [one for one in found if one is not None]

    def item(self, place: Any, what: str) -> Item | None:
        if self.kind(place) != "mapping":
            self.document.problem(self.line(place), what, "it is no mapping", "write words and their values")
            return None
        pairs = self.pairs(place)
        words = {key: self.value(one, key) for key, _, one in pairs}
        return Item(words, self.line(place), {key: line for key, line, _ in pairs})

    def twice(self, line: int, word: str) -> None:
        self.document.problem(line, word, "it is given twice", "leave one of them")

    @abstractmethod
    def top(self) -> Any:
        """The place of all."""

    @abstractmethod
    def kind(self, place: Any) -> str:
        """`list`, `mapping`, or another word."""

    @abstractmethod
    def line(self, place: Any) -> int: ...

    @abstractmethod
    def elements(self, place: Any) -> list[Any]:
        """The places in a list."""

    @abstractmethod
    def pairs(self, place: Any) -> list[tuple[str, int, Any]]:
        """Keys of a mapping, their lines, the places of their values; each key once."""

    @abstractmethod
    def value(self, place: Any, word: str) -> Any:
        """What stands there: lists, dicts, texts, None. `word` is named where it is wrong."""
