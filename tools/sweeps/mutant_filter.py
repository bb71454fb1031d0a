"""Leave out mutants that tell nothing. Started by `tools.sweeps.mutants` where the mutation tester is.

Annotations are never computed here (`from __future__ import annotations`): to change one changes nothing.
That a dataclass is frozen is a promise to the type checker, and that a zip is strict an assertion about
bntool itself. The star of `f(*, x)` is no operator. A number is raised by one and not lowered as well, and
what is negated by its own operator (`==`, `is`, `not`) is not negated once more.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

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


def silent(source: str) -> list[Span]:
    """Where nothing that is changed shows: pairs of (line, column)."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.ClassDef):
            found += node.decorator_list
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
    return [(_start(e), _end(e)) for e in found if e is not None]


def operators(source: str) -> list[Span]:
    """Where an operator stands between two values."""
    found: list[Span] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            found.append((_end(node.left), _start(node.right)))
        elif isinstance(node, ast.AugAssign):
            found.append((_end(node.target), _start(node.value)))
    return found


def negated(source: str) -> list[Span]:
    """Where a condition stands whose negation is the mutant of its own operator."""
    tests = [n.test for n in ast.walk(ast.parse(source)) if isinstance(n, ast.If | ast.IfExp | ast.While)]
    own = ast.Eq | ast.NotEq | ast.Is | ast.IsNot
    return [
        (_start(test), _end(test))
        for test in tests
        if (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))
        or (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], own))
    ]


def _start(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def is_wanted(operator: str, start: tuple[int, int], occurrence: int, source: str) -> bool:
    """Whether a mutant of this operator that starts here says anything about the tests."""
    within = lambda spans: any(first <= start < last for first, last in spans)  # noqa: E731
    name = operator.rpartition("/")[2]
    if name not in KEPT or within(silent(source)):
        return False
    if name == "NumberReplacer":
        return occurrence % 2 == 0  # it counts both for every number: one more, one less
    if name == "AddNot":
        return not within(negated(source))
    return "BinaryOperator" not in name or within(operators(source))


def main(session: str) -> None:
    """Mark what is not wanted as skipped in a session of the mutation tester."""
    from cosmic_ray.work_db import use_db  # type: ignore[import-not-found]
    from cosmic_ray.work_item import WorkerOutcome, WorkResult  # type: ignore[import-not-found]

    with use_db(session) as db:
        for item in list(db.pending_work_items):
            (mutation,) = item.mutations
            source = Path(mutation.module_path).read_text(encoding="utf-8")
            start = tuple(mutation.start_pos)
            if not is_wanted(mutation.operator_name, start, mutation.occurrence, source):
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output=""))


if __name__ == "__main__":
    main(sys.argv[1])
