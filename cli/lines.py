"""Tables of plain text, as `kubectl get` prints them: rich takes seconds for ten thousand rows."""

import unicodedata
from collections.abc import Sequence

from cli.output import one_line

GAP = "  "


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Header and rows, each column as wide as its widest cell; lines are cut to `width` if one is given."""
    clean = [header, *([one if one.isprintable() else one_line(one) for one in row] for row in rows)]
    padded = [_padded(column) for column in zip(*clean, strict=True)]
    lines = [GAP.join(row).rstrip() for row in zip(*padded, strict=True)]
    return "\n".join(lines if width is None else [cut(line, width) for line in lines])


def cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def cut(text: str, width: int) -> str:
    """The text in at most `width` columns of a terminal, with a mark where something is left out."""
    if cells(text) <= width:
        return text
    kept = text[: width - 1]
    while cells(kept) > width - 1:
        kept = kept[:-1]
    return kept + "…"


def _padded(column: Sequence[str]) -> list[str]:
    sizes = [cells(one) for one in column]
    widest = max(sizes)
    return [one + " " * (widest - size) for one, size in zip(column, sizes, strict=True)]
