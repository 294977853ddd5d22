"""Tables of plain text."""

import pytest

from cli.lines import cells, columns, cut


def test_a_column_is_as_wide_as_its_widest_cell_and_no_line_ends_in_blanks() -> None:
    """As `kubectl get` prints: what follows a cell begins in one column in every line."""
    text = columns(("ID", "STATE", "ERROR"), [("sb-1", "queued", ""), ("sb-22", "x", "netns: no room")])

    assert text.splitlines() == ["ID     STATE   ERROR", "sb-1   queued", "sb-22  x       netns: no room"]


def test_no_rows_leave_the_header() -> None:
    assert columns(("ID", "STATE"), []) == "ID  STATE"


def test_wide_and_combining_characters_count_as_a_terminal_shows_them() -> None:
    """Two columns for a CJK character, none for a combining accent."""
    lines = columns(("A", "B"), [("東京", "1"), ("e\u0301", "2"), ("abcde", "3")]).splitlines()

    assert {cells(line[: line.index(digit)]) for line, digit in zip(lines[1:], "123", strict=True)} == {7}


@pytest.mark.parametrize("bad", ["a\nb", "a\x1b[31mb", "a\rb", "\ud800"])
def test_what_a_sandbox_wrote_cannot_break_a_line_or_steer_the_terminal(bad: str) -> None:
    """Errors and commands are shown as they are told, which may be anything."""
    lines = columns(("ID", "ERROR"), [("sb-1", bad)]).split("\n")

    assert len(lines) == 2
    assert lines[1].isascii()
    assert lines[1].isprintable()


@pytest.mark.parametrize(
    ("text", "width", "shown"), [("abcdef", 6, "abcdef"), ("abcdef", 5, "abcd…"), ("東京都", 5, "東京…")]
)
def test_a_line_is_cut_to_the_width(text: str, width: int, shown: str) -> None:
    assert cut(text, width) == shown
