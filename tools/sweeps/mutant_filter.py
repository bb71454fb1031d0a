"""Leave out mutants that tell nothing. Started by `tools.sweeps.mutants` where the mutation tester is.

Annotations are never computed here (`from __future__ import annotations`): to change one changes nothing.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

KEPT = frozenset(
    """NumberReplacer AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd
    ReplaceUnaryOperator_Delete_Not ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Invert
    ReplaceBreakWithContinue ReplaceContinueWithBreak ZeroIterationForLoop
    ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_Div
    ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_Mod_Mul
    ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_BitOr_BitAnd ReplaceBinaryOperator_BitAnd_BitOr
    ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq ReplaceComparisonOperator_Lt_LtE
    ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE ReplaceComparisonOperator_GtE_Gt
    ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is""".split()
)
"""One replacement for each operator: eleven for a minus, most of them type errors, tell no more than one."""

Span = tuple[tuple[int, int], tuple[int, int]]


def annotations(source: str) -> list[Span]:
    """Where annotations stand: pairs of (line, column)."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
    return [
        ((e.lineno, e.col_offset), (e.end_lineno or e.lineno, e.end_col_offset or e.col_offset))
        for e in found
        if e is not None
    ]


def is_wanted(operator: str, start: tuple[int, int], spans: list[Span]) -> bool:
    """Whether a mutant of this operator that starts here says anything about the tests."""
    inside = any(first <= start < last for first, last in spans)
    return operator.rpartition("/")[2] in KEPT and not inside


def main(session: str) -> None:
    """Mark what is not wanted as skipped in a session of the mutation tester."""
    from cosmic_ray.work_db import use_db  # type: ignore[import-not-found]
    from cosmic_ray.work_item import WorkerOutcome, WorkResult  # type: ignore[import-not-found]

    spans: dict[Any, list[Span]] = {}
    with use_db(session) as db:
        for item in list(db.pending_work_items):
            (mutation,) = item.mutations
            path = mutation.module_path
            if path not in spans:
                spans[path] = annotations(Path(path).read_text(encoding="utf-8"))
            if not is_wanted(mutation.operator_name, tuple(mutation.start_pos), spans[path]):
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output=""))


if __name__ == "__main__":
    main(sys.argv[1])
