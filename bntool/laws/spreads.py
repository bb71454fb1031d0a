"""How far values lie from their mean, or from zero: a scale passes by its size, whatever its sign."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op
from bntool.laws.base import Context, Maps, Refused, identities, law, no_shift, non_negative, of_input
from bntool.laws.sampling import after_reduction, before_reduction

_SQUARED = frozenset({"var", "var_mean"})
_WITH_MEAN = frozenset({"std_mean", "var_mean"})


@law("std", "var", "std_mean", "var_mean", "vector_norm")
class Spread:
    """std(s·x + t) = |s|·std(x) and var(s·x + t) = s²·var(x); ‖s·x‖ = |s|·‖x‖, which a shift does not pass.

    Upstream only a scale that is not negative can be met, and no shift: a spread tells nothing of either.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        demand = before_reduction(context, op, demands[0])
        if op.kind in _WITH_MEAN:
            raise Refused(Reason.MIXED_BRANCHES, f"{op.label} gives two values that depend on each other")
        no_shift(demand, Reason.NONLINEAR, f"nothing before {op.label} shifts what it gives")
        non_negative(demand, op.label)
        return {"input": demand.then("root") if op.kind in _SQUARED else demand}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        affine = of_input(op, maps)
        if op.kind == "vector_norm":
            no_shift(affine, Reason.NONLINEAR, f"{op.label} measures from zero, which a shift moves")
        spread = affine.then("square" if op.kind in _SQUARED else "size")
        behind = {0: after_reduction(context, op, spread)}
        if op.kind in _WITH_MEAN:
            behind[1] = after_reduction(context, op, affine)
        return identities(context, op, behind)
