"""Sums over places that the data name: the messages of a graph network, added up at its nodes."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, add, identity
from bntool.graph.dataflow import Op
from bntool.laws.base import Context, Maps, Refused, along, constant_over, law, no_shift, non_negative


@law("scatter_sum", "scatter_mean", "scatter_extreme")
class Scatter:
    """out[place] = base[place] + Σ source: s·(base + Σ source) = s·base + Σ s·source, along all axes but
    the one over which is added up. How many summands a place gets is not known, so a shift goes with the
    base alone.

    Their mean lets the scale alone by, and the largest or smallest one that is not negative. A base of zeros
    is its own multiple. One that is left out where there are summands (`apart`) lets the scale alone by.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        demand = _even(context, op, demands[0])
        if _starts_from_zeros(context, op):
            no_shift(demand, Reason.NONLINEAR, f"{op.label} adds up as many values as the data say")
            return {op.attrs["source"]: demand}
        if op.kind != "scatter_sum" or op.attrs.get("apart"):
            no_shift(demand, Reason.NONLINEAR, f"{op.label} mixes what is shifted with what is not")
        return {"input": demand, op.attrs["source"]: demand.then("scale_part")}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        if not maps.keys() <= {"input", op.attrs["source"]}:
            raise Refused(Reason.NONLINEAR, f"{op.label} finds its places in what changes")
        rank = len(context.graph.output(op).shape)
        base, source = (
            _even(context, op, maps.get(role, identity(rank))) for role in ("input", op.attrs["source"])
        )
        no_shift(source, Reason.NONLINEAR, f"{op.label} adds up as many values as the data say")
        if _starts_from_zeros(context, op):
            return [source]
        if op.kind != "scatter_sum" or op.attrs.get("apart"):
            no_shift(base, Reason.NONLINEAR, f"{op.label} mixes what is shifted with what is not")
        joined = add(base, source)
        if joined is None:
            raise Refused(Reason.MIXED_BRANCHES, f"the parts of {op.label} carry different scales")
        return [joined]


def _even(context: Context, op: Op, affine: Affine) -> Affine:
    """The map, the same all along the axis of the sum, on operands that match along the others."""
    shape = context.graph.output(op).shape
    axis = op.attrs["axis"] % max(1, len(shape))
    affine = constant_over(along(affine, len(shape), op.label), [axis], op.label)
    for role in (op.attrs["source"], *(("index",) if op.attrs["elementwise"] else ())):
        other = context.graph.input(op, role).shape
        if len(other) != len(shape) or _without(other, axis) != _without(shape, axis):
            raise Refused(Reason.AXIS_MISMATCH, f"{op.label} adds to a part of its other axes")
    if op.kind == "scatter_extreme":
        non_negative(affine, op.label)
    return affine


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _starts_from_zeros(context: Context, op: Op) -> bool:
    """Whether all that is added to is zero; refused where it is a constant of another kind."""
    base = context.graph.input(op)
    if not base.constant:
        return False
    made = context.graph.producer(base)
    if made is not None and made.kind in ("zeros", "zeros_like", "new_zeros"):
        return True
    numbers = context.graph.constant(base)
    if numbers is None or bool(numbers.count_nonzero()):
        raise Refused(Reason.UNKNOWN_OP, f"{op.label} adds to a constant that is not known to be zero")
    return True
