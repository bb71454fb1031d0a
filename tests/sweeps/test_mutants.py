"""The tool that counts what the tests notice, and its page."""

from __future__ import annotations

from tools.sweeps.mutant_filter import annotations, is_wanted
from tools.sweeps.mutants import OPEN, PAGE, ROOT, TESTS, changed, joined, page, read, rows

SOURCE = """def f(x: int | None, y: float = 1.0) -> int | str:
    z: int | None = 3
    return (x or 1) | z
"""
DIFF = """--- mutation diff ---
--- abare.py
+++ bare.py
@@ -1,3 +1,3 @@
 def f():
-    return a - b
+    return a + b
"""


def dumped(outcome: str, line: int = 2) -> list[object]:
    return [{"mutations": [{"start_pos": [line, 4]}]}, {"test_outcome": outcome, "diff": DIFF}]


def test_what_stands_in_an_annotation_is_left_out() -> None:
    spans = annotations(SOURCE)
    operator = "core/ReplaceBinaryOperator_BitOr_BitAnd"
    for line, text in enumerate(SOURCE.splitlines(), 1):
        for column in (i for i, character in enumerate(text) if character == "|"):
            assert is_wanted(operator, (line, column), spans) == text.strip().startswith("return")
    assert is_wanted("core/NumberReplacer", (1, SOURCE.index("1.0")), spans)
    assert not is_wanted("core/ReplaceBinaryOperator_BitOr_LShift", (3, 20), spans)


def test_rows_count_what_is_noticed_and_list_what_is_not() -> None:
    skipped = [{"mutations": [{"start_pos": [1, 0]}]}, {"worker_outcome": "skipped", "test_outcome": None}]
    all_of_them = [dumped("killed"), dumped("survived", 7), dumped("incompetent"), skipped, [{}, None]]
    total, survivor = rows("bntool/a.py", "tests/test_a.py", all_of_them)  # type: ignore[arg-type]
    assert (total["killed"], total["survived"]) == (2, 1)
    assert survivor == {
        "module": "bntool/a.py",
        "line": 7,
        "before": "return a - b",
        "after": "return a + b",
        "verdict": OPEN,
    }
    assert changed(DIFF) == ("return a - b", "return a + b")


def test_a_verdict_outlives_the_next_run() -> None:
    old = rows("bntool/a.py", "tests", [dumped("survived", 7)])  # type: ignore[list-item]
    old[1]["verdict"] = "equivalent: b is zero"
    other = rows("bntool/b.py", "tests", [dumped("killed")])  # type: ignore[list-item]
    new = rows("bntool/a.py", "tests", [dumped("survived", 9)])  # type: ignore[list-item]
    found = joined(old + other, new)
    assert [row.get("line") for row in found] == [None, None, 9]
    assert found[-1]["verdict"] == "equivalent: b is zero"
    assert "| `bntool/a.py` | 1 | 0 | 1 | 1 | 0 |" in page(found)


def test_every_module_and_test_that_it_names_is_there() -> None:
    for module, tests in TESTS.items():
        assert all((ROOT / path).exists() for path in (module, *tests.split()))


def test_the_page_is_that_of_the_rows_and_every_survivor_has_a_verdict() -> None:
    found = read()
    assert PAGE.read_text(encoding="utf-8") == page(found)
    assert not [row for row in found if row.get("verdict") == OPEN]
