from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bntool.core.errors import LoadError
from bntool.core.text import Lines, as_lines, shown, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("layer1.0 naïve 畳み込み", "layer1.0 naïve 畳み込み"),
        ("a\x1b[2J", r"a\x1b[2J"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x7f\x9b1m", r"\x7f\x9b1m"),
        ("\u202egnp\u2066", r"\u202egnp\u2066"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("caf\udce9", r"caf\udce9"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_moves_hides_or_turns_is_written_out(text: str, seen: str) -> None:
    assert visible(text) == seen


@given(st.text(st.characters()))
def test_whatever_the_text_it_is_one_printable_line_and_stays_so(text: str) -> None:
    seen = visible(text)
    assert seen.isprintable()
    assert visible(seen) == seen
    assert shown(text, 20).isprintable()
    assert len(shown(text, 20)) <= 20


def test_a_line_end_in_a_name_makes_no_line() -> None:
    told = as_lines("first", "a\nb", as_lines("x", "y"))
    assert isinstance(told, Lines)
    assert told.split("\n") == ["first", r"a\nb", "x", "y"]


def test_an_error_has_its_three_lines_whatever_it_is_about() -> None:
    error = LoadError("no file a\nnext: run evil", where="a\nb\x1b[2J", next_step="look")
    assert str(error).split("\n") == [r"no file a\nnext: run evil", r"  where: a\nb\x1b[2J", "  next:  look"]
    assert error.to_dict()["where"] == "a\nb\x1b[2J"
