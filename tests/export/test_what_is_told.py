"""What is told of torch's own errors."""

from __future__ import annotations

from bntool.export.capturing import essence


def test_a_line_of_thousands_of_letters_is_cut_at_a_word() -> None:
    sizes = " + ".join(f"4*Min(300, u{i})" for i in range(90))
    told = essence(RuntimeError(f"Could not guard on data-dependent expression {sizes} > 4000"))
    assert told.startswith("Could not guard on data-dependent expression 4*Min(300, u0) + ")
    assert told.endswith(" …")
    assert len(told) <= 300


def test_a_line_of_usual_length_is_told_whole() -> None:
    assert essence(RuntimeError("Could not guard on u0 > 4\nmore")) == "Could not guard on u0 > 4"
    assert essence(RuntimeError()) == "RuntimeError"
