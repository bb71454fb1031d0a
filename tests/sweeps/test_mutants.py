"""The tool that counts what the tests notice, and its page."""

from __future__ import annotations

import re

from tools.sweeps.mutant_filter import is_wanted
from tools.sweeps.mutant_runner import function
from tools.sweeps.mutants import OPEN, PAGE, ROOT, TESTS, changed, joined, page, read, rows

SOURCE = """@dataclass(frozen=True)
class C:
    def f(x: int | None, *, y: float = 1.0) -> int | str:
        z: int | None = 3
        return (x or 1) | z, zip(x, y, strict=True), x * y, f(*x)
    def g(x):
        return (x if not x else 2), (x if x < 3 else 4), (x if x == 5 else 6)
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


def test_what_tells_nothing_is_left_out() -> None:
    def wanted(operator: str, character: str, occurrence: int = 0) -> list[bool]:
        lines = enumerate(SOURCE.splitlines(), 1)
        places = [(i, m.start()) for i, line in lines for m in re.finditer(re.escape(character), line)]
        return [is_wanted(f"core/{operator}", place, occurrence, SOURCE) for place in places]

    assert wanted("ReplaceBinaryOperator_BitOr_BitAnd", "|") == [False] * 3 + [True]
    assert wanted("ReplaceBinaryOperator_BitOr_LShift", "|") == [False] * 4
    assert wanted("ReplaceBinaryOperator_Mul_Div", "*") == [False, True, False]
    assert wanted("ReplaceTrueWithFalse", "True") == [False, False]
    assert wanted("NumberReplacer", "1.0") == [True]
    assert wanted("NumberReplacer", "1.0", occurrence=1) == [False]
    assert wanted("AddNot", "not x") == wanted("AddNot", "x == 5") == [False]
    assert wanted("AddNot", "x < 3") == [True]


def test_a_line_is_of_the_innermost_function_whose_body_holds_it() -> None:
    source = "@g\ndef f(x=1):\n    def h(y=x + 1):\n        return y\n    return h\nf()\n"
    assert [function(source, line) for line in range(1, 7)] == [None, None, 1, 3, 1, None]


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
