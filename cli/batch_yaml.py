"""Batch files in YAML: anchors, aliases and merges, each key once, and no types but the words' own."""

from typing import Any

import yaml

from cli.batch_text import Reader

NULLS = ("", "~", "null", "Null", "NULL")
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
MOST_VALUES = 100_000  # of one value, aliases written out: a few lines of YAML can mean billions


class Yaml(Reader):
    """YAML. A place is a node, which knows its line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.known: dict[int, tuple[Any, int]] = {}  # by node: an alias is the same node; and its size
        self.under_way: set[int] = set()

    def top(self) -> Any:
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml's is ten times as fast
        nothing = yaml.ScalarNode("", "", yaml.Mark("", 0, 0, 0, "", 0))
        return yaml.compose(self.text, Loader=loader) or nothing

    def kind(self, place: Any) -> str:
        return {"sequence": "list", "mapping": "mapping"}.get(place.id, "text")

    def line(self, place: Any) -> int:
        return int(place.start_mark.line) + 1

    def elements(self, place: Any) -> list[Any]:
        return list(place.value)

    def pairs(self, place: Any) -> list[tuple[str, int, Any]]:
        own: dict[str, tuple[str, int, Any]] = {}
        merged: dict[str, tuple[str, int, Any]] = {}
        self.under_way.add(id(place))
        for key, value in place.value:
            name, line = key.value, self.line(key)
            if not isinstance(name, str):
                self.document.problem(line, "spec", "a key is no text", "write words and their values")
            elif name == "<<" and not key.style:
                for one in value.value if value.id == "sequence" else [value]:
                    if one.id == "mapping" and id(one) not in self.under_way:
                        for pair in self.pairs(one):
                            merged.setdefault(pair[0], pair)
                    else:
                        self.document.problem(line, name, "it names no mapping", "name one by its anchor")
            elif name in own:
                self.twice(line, name)
            else:
                own[name] = (name, line, value)
        self.under_way.discard(id(place))
        return list({**merged, **own}.values())

    def value(self, place: Any, word: str) -> Any:
        found, size = self._value(place, word)
        if size > MOST_VALUES:
            self.document.problem(self.line(place), word, f"{size} values are too many", "write fewer")
            return None
        return found

    def _value(self, node: Any, word: str) -> tuple[Any, int]:
        if id(node) in self.known:
            return self.known[id(node)]
        if node.id == "scalar":
            if not node.style and node.value in NULLS:
                return None, 1
            if node.tag not in PLAIN_TAGS:
                self.document.problem(self.line(node), word, f"no tag {node.tag} here", "write plain text")
            return node.value, 1
        if id(node) in self.under_way:
            self.document.problem(self.line(node), word, "it contains itself", "write it out")
            return None, 1
        made: Any
        if node.id == "sequence":
            self.under_way.add(id(node))
            members = [self._value(one, word) for one in node.value]
            self.under_way.discard(id(node))
            made = [one for one, _ in members]
        else:
            pairs = self.pairs(node)
            self.under_way.add(id(node))
            members = [self._value(one, f"{word}.{key}") for key, _, one in pairs]
            self.under_way.discard(id(node))
            made = {key: one for (key, _, _), (one, _) in zip(pairs, members, strict=True)}
        self.known[id(node)] = made, 1 + sum(size for _, size in members)
        return self.known[id(node)]
