"""A PReLU with a slope for each channel lets a negative scale by, for its slope can turn over."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, Constant
from bntool.graph.dataflow import Op
from bntool.laws.base import (
    Context,
    Maps,
    Refused,
    along,
    constant_over,
    law,
    no_shift,
    non_negative,
    of_input,
    only_input,
)


@law("prelu")
class PReLU:
    """f(s·x) = s·f(x) for s ≥ 0. For s < 0 and a slope a > 0: f(s·x) = (a·s)·g(x) and s·f(x) = g((a·s)·x),
    where g has the slope 1/a; so a stored slope that nothing else reads is turned over, channel by channel.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _turned(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_turned(context, op, of_input(op, maps))]


def _turned(context: Context, op: Op, affine: Affine) -> Affine:
    data = only_input(context, op)
    no_shift(affine, Reason.NONLINEAR, f"{op.label} stands in the way of the shift")
    try:
        non_negative(affine, op.label)
    except Refused:
        slope = _own_slope(context, op)
        if slope is None:
            raise
        return _with_slope(context, op, along(affine, len(data.shape), op.label), slope)
    return affine


def _with_slope(context: Context, op: Op, affine: Affine, slope: Constant) -> Affine:
    """The map on the other side, with the slope turned over where the scale is negative."""
    if bool(((affine.scale < 0) & (slope.tensor <= 0)).any()):
        raise Refused(Reason.NEGATIVE_SCALE, f"γ < 0 meets a slope of {op.label} that is not positive")
    alike = [axis for axis, size in enumerate(slope.tensor.shape) if size == 1]
    try:
        change = constant_over(affine.then_constant("slope", slope), alike, op.label)
    except Refused as refusal:
        what = f"{op.label} has one slope for channels with γ of both signs"
        raise Refused(Reason.NEGATIVE_SCALE, what) from refusal
    role = _slope_of(op)
    stored = context.graph.input(op, role).shape
    if not context.take_in(op, role, change.then("reshape", tuple(change.scale.shape), stored)):
        raise Refused(Reason.NEGATIVE_SCALE, f"γ < 0 would turn the slope of {op.label}")
    return affine.then_constant("turn", slope)


def _slope_of(op: Op) -> str:
    """The role of the slope: a file and a module call it by other names."""
    return next(role for role in op.reads if role != "input")


def _own_slope(context: Context, op: Op) -> Constant | None:
    """The stored slope, shaped for the data; None where others read it, or an earlier fold turned it."""
    graph, value = context.graph, context.graph.input(op, _slope_of(op))
    tensor = graph.tensors.get(value.handle) if value.handle else None
    if tensor is None or not tensor.is_floating_point() or value.handle in context.changed:
        return None
    if len(value.readers) > 1 or graph.aliases.get(value.handle):
        return None
    rank = len(graph.input(op).shape)
    found = Constant.of(tensor, value.handle, rank)
    if "axis" not in op.attrs or tensor.numel() == 1:
        return found
    shape = (1, -1, *[1] * (rank - 2))
    numbers = found.tensor.reshape(shape)
    return Constant(numbers, ("tensor", value.handle, tuple(numbers.shape)))
