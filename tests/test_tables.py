from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.report.tables import (
    Column,
    Table,
    count,
    render,
    shape_text,
    shorten_middle,
    signed,
    size,
    wrapped,
)

COLUMNS = (Column("Layer", flexible=True), Column("Name", flexible=True), Column("Count", number=True))


@given(st.text(st.characters(codec="ascii"), max_size=60), st.integers(0, 60))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shorten_middle(text, width)
    assert len(short) == min(len(text), width)
    if len(text) > width >= 4:
        assert (short[0], short[-1]) == (text[0], text[-1])


def test_numbers_are_never_cut() -> None:
    table = Table(COLUMNS, [["a" * 40, "b" * 40, "1,234,567,890"]], footer=["total", "", "1,234,567,890"])
    lines = render(table, 20).splitlines()
    assert lines[2].endswith("1,234,567,890")
    assert lines[4].endswith("1,234,567,890")


def test_the_rightmost_flexible_column_gives_way_first() -> None:
    row = render(Table(COLUMNS, [["BatchNorm2d-12", "a.very.long.qualified.name", "7"]]), 40).splitlines()[2]
    assert "BatchNorm2d-12" in row
    assert ".." in row


def test_markup_and_colour_are_text() -> None:
    text = render(Table(COLUMNS, [["[red]x[/red]", "", "1"]]), 80)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_an_empty_table_is_its_head() -> None:
    lines = render(Table(COLUMNS, [], title="nothing"), 80).splitlines()
    assert lines[:2] == ["nothing", "Layer  Name  Count"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (195_536, "191.0 KiB"), (553_430_048, "527.8 MiB")]
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


def test_counts_and_shapes() -> None:
    assert count(48_884) == "48,884"
    assert [signed(n) for n in (1280, -64, 0)] == ["+1,280", "-64", "0"]
    assert [shape_text(s) for s in ((1, 3, 8, 8), (), None)] == ["1x3x8x8", "scalar", ""]


def test_wrapped_lines_are_indented_and_names_stay_whole() -> None:
    text = wrapped("note: one two features.12.a-long-name three", 24, indent="      ")
    assert text.splitlines() == ["note: one two", "      features.12.a-long-name", "      three"]


def test_names_that_differ_still_differ_when_shortened() -> None:
    names = [f"features.4.expand{size}_activation.0" for size in ("1x1", "3x3")]
    drawn = render(Table((Column("Name", flexible=True),), [[name] for name in names]), width=22)
    first, second = drawn.split("\n")[-2:]
    assert first != second
    assert len(first) == len(second) == 22
