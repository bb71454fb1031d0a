from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.core.text import asked_width
from bntool.results.tables import (
    Column,
    Table,
    count,
    render,
    shape_text,
    shorten,
    signed,
    size,
    wrapped,
)

COLUMNS = (Column("Layer", flexible=True), Column("Name", flexible=True), Column("Count", number=True))


@given(st.text(st.characters(codec="ascii"), max_size=60), st.integers(0, 60))
def test_a_shortened_text_fits_and_keeps_its_end(text: str, width: int) -> None:
    short = shorten(text, width)
    assert len(short) == min(len(text), width)
    if len(text) > width >= 3:
        assert short == ".." + text[2 - width :]


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


LONG = "backbone.layer4.2.conv3.a_name_that_nobody_can_type_twice"
WIDE = Table(
    (Column("Name", flexible=True), Column("Frozen", number=True), Column("Trainable", number=True)),
    [[LONG, "0", "1,000"], [f"{LONG}.1", "0", "2,000"]],
    footer=["total", "0", "3,000"],
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_are_whole_where_nobody_can_widen_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in ("pipe", "columns", "width"):
        if name == "columns":
            monkeypatch.setenv("COLUMNS", "40")
            monkeypatch.setattr("sys.stdout", Terminal())
        token = asked_width.set(30 if name == "width" else None)
        drawn = render(WIDE)
        asked_width.reset(token)
        assert f"{LONG}.1" in drawn
        assert ("Frozen" in drawn) == (name == "pipe")  # a column of zeros goes where it is too wide


def test_in_a_terminal_a_column_of_zeros_goes_first_and_then_the_beginning_of_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((40, 24)))
    drawn = render(WIDE)
    assert "Frozen" not in drawn
    assert max(map(len, drawn.splitlines())) == 40
    assert drawn.splitlines()[2].startswith("..") and "type_twice " in drawn
    assert "type_twice.1" in drawn


def test_names_that_differ_at_the_beginning_keep_what_tells_them_apart() -> None:
    names = [f"block{i}.{'x' * 40}" for i in (1, 2)]
    drawn = render(Table((Column("Name", flexible=True),), [[name] for name in names]), width=22)
    first, second = drawn.split("\n")[-2:]
    assert first != second
    assert (first[:6], first[-8:]) == ("block1", "x" * 8)
