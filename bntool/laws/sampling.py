"""Ops that average or pick over space: pools, means, upsampling, padding."""

from __future__ import annotations

import math

import torch

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, Constant, concat, identity
from bntool.graph.dataflow import Op
from bntool.laws.base import (
    Context,
    Maps,
    Refused,
    along,
    constant_over,
    identities,
    law,
    no_shift,
    non_negative,
    of_input,
    only_input,
)


def _spatial(context: Context, op: Op, affine: Affine, dims: int) -> Affine:
    """The map, which must be constant over the last `dims` axes (they are mixed)."""
    rank = len(context.graph.input(op).shape)
    return constant_over(along(affine, rank, op.label), list(range(rank - dims, rank)), op.label)


def _pooled_dims(context: Context, op: Op) -> int:
    """How many trailing axes a pool or an upsampling mixes: those after the channel axis."""
    dims = op.attrs.get("dims")
    return int(dims) if dims is not None else max(1, len(context.graph.input(op).shape) - 2)


@law("avg_pool")
class AveragePool:
    """A mean commutes with an affine map; where zeros of a padding are counted, with the scale alone."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _average(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_average(context, op, of_input(op, maps))]


def _average(context: Context, op: Op, affine: Affine) -> Affine:
    affine = _spatial(context, op, affine, op.attrs["dims"])
    pads = any(op.attrs["padding"]) and op.attrs["count_include_pad"]
    if pads or op.attrs["divisor_override"] is not None:
        no_shift(affine, Reason.SHIFT_AT_PADDING, f"{op.label} counts the zeros of its padding")
    return affine


@law("adaptive_avg_pool", "upsample")
class WeightedMean:
    """Every output is a weighted mean of inputs with weights that sum to one.

    Adaptive average pooling, and nearest, linear, bilinear, bicubic and trilinear upsampling.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        only_input(context, op)
        return {"input": _spatial(context, op, demands[0], _pooled_dims(context, op))}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        only_input(context, op)
        return [_spatial(context, op, of_input(op, maps), _pooled_dims(context, op))]


@law("max_pool")
class MaxPool:
    """max(s·x + t) = s·max(x) + t for s ≥ 0. Padding is −∞, so it never wins. The maximum of one is itself,
    for any s.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _maximum(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        # the indices, where the op returns them too, stay what they were
        return identities(context, op, {0: _maximum(context, op, of_input(op, maps))})


def _maximum(context: Context, op: Op, affine: Affine) -> Affine:
    if not op.attrs.get("single"):
        _require_order(context, op, affine)
    return _spatial(context, op, affine, _pooled_dims(context, op))


def _require_order(context: Context, op: Op, affine: Affine) -> None:
    """What is larger stays larger. Nobody may ask where it was: of two equal ones, rounding picks another."""
    places = [context.graph.values[value] for value in op.outputs[1:]]
    if any(value.readers or value.is_output or value.escapes for value in places):
        raise Refused(Reason.UNKNOWN_OP, f"the indices of {op.label} are used")
    non_negative(affine, op.label)


@law("mean", "sum")
class Reduction:
    """A mean over axes the map does not depend on.

    A sum of n elements is n times their mean: Σ(s·x + t) = s·Σx + n·t.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        demand = before_reduction(context, op, demands[0])
        return {"input": _counted(context, op, demand, "divide_shift")}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        counted = _counted(context, op, of_input(op, maps), "multiply_shift")
        return [after_reduction(context, op, counted)]


@law("amax", "amin", "order_statistic")
class OrderStatistic:
    """The largest, the smallest, the middle, the sorted values along axes: of s·x + t they are s times
    those of x, plus t, for s ≥ 0.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        demand = before_reduction(context, op, demands[0])
        _require_order(context, op, demand)
        return {"input": demand}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        affine = of_input(op, maps)
        _require_order(context, op, affine)
        return identities(context, op, {0: after_reduction(context, op, affine)})


def _rank(context: Context, op: Op) -> int:
    return len(context.graph.input(op).shape)


def before_reduction(context: Context, op: Op, demand: Affine) -> Affine:
    """The demand on what is reduced, which must be the same all along the axes that go."""
    axes = _reduced(context, op)
    if not op.attrs["keepdim"]:
        shape = list(along(demand, _rank(context, op) - len(axes), op.label).scale.shape)
        for axis in axes:
            shape.insert(axis, 1)
        demand = demand.then("reshape", tuple(demand.scale.shape), tuple(shape))
    return constant_over(along(demand, _rank(context, op), op.label), axes, op.label)


def after_reduction(context: Context, op: Op, affine: Affine) -> Affine:
    """The map of what was reduced, the same all along the axes that went, and without them."""
    axes = _reduced(context, op)
    affine = constant_over(along(affine, _rank(context, op), op.label), axes, op.label)
    if op.attrs["keepdim"]:
        return affine
    shape = tuple(n for i, n in enumerate(affine.scale.shape) if i not in axes)
    return affine.then("reshape", tuple(affine.scale.shape), shape)


def _counted(context: Context, op: Op, affine: Affine, step: str) -> Affine:
    """The map with its shift times, or divided by, the number of elements that a sum adds up."""
    count = math.prod(context.graph.input(op).shape[axis] for axis in _reduced(context, op))
    if op.kind != "sum" or not affine.has_shift:
        return affine
    if not count:
        raise Refused(Reason.AXIS_MISMATCH, f"{op.label} adds up no elements")
    return affine.then_constant(step, Constant.of(torch.tensor(float(count)), "", affine.rank))


def _reduced(context: Context, op: Op) -> list[int]:
    rank, axes = _rank(context, op), op.attrs["axes"]
    if axes is None or len(axes) == 0:
        return list(range(rank))
    return sorted(axis % rank for axis in axes)


@law("grid_sample")
class GridSample:
    """Weighted means at places that another input names, with weights that sum to one; zeros that stand
    outside of the image have no shift (Jaderberg et al. 2015, Spatial Transformer Networks).
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _sampled(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_sampled(context, op, of_input(op, maps))]


def _sampled(context: Context, op: Op, affine: Affine) -> Affine:
    affine = _spatial(context, op, affine, _rank(context, op) - 2)
    if op.attrs["zeros"]:
        no_shift(affine, Reason.SHIFT_AT_PADDING, f"{op.label} reads zeros outside, which have no shift")
    return affine


@law("pad")
class Pad:
    """Copied values (reflect, replicate, circular) carry the whole map; zeros carry the scale alone.

    Zeros beside the channels are like parts of a concatenation that have no map.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape = context.graph.input(op).shape
        demand, beside, along_it = _padded_axes(context, op, demands[0])
        if beside or along_it:
            _require_bare_zeros(op, demand)
        for axis, (before, _) in beside.items():
            demand = demand.then("slice", axis, before, before + shape[axis], 1)
        return {"input": demand}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape = context.graph.input(op).shape
        affine, beside, along_it = _padded_axes(context, op, of_input(op, maps))
        if along_it:
            _require_bare_zeros(op, affine)
        for axis, (before, after) in beside.items():
            parts = [(identity(len(shape)), before), (affine, shape[axis]), (identity(len(shape)), after)]
            present, sizes = zip(*((part, size) for part, size in parts if size), strict=True)
            affine = concat(present, axis, sizes)
        return [affine]


def _padded_axes(
    context: Context, op: Op, affine: Affine
) -> tuple[Affine, dict[int, tuple[int, int]], list[int]]:
    """The map; the axes along which it varies that get zeros at their ends, and how many; and the axes of
    other zeros.
    """
    pads, rank = op.attrs["pads"], len(context.graph.input(op).shape)
    amounts = {rank - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}
    affine = along(affine, rank, op.label)
    zeros = op.attrs["mode"] == "constant"
    parts = zeros and op.attrs["value"] == 0.0
    beside = {
        axis: ends
        for axis, ends in amounts.items()
        if parts and any(ends) and min(ends) >= 0 and affine.scale.shape[axis] > 1
    }
    others = [axis for axis, ends in amounts.items() if axis not in beside]
    affine = constant_over(affine, [axis for axis in others if any(amounts[axis])], op.label)
    # amounts of zero or less may come from the size of the image: at another size they pad
    return affine, beside, others if zeros else []


def _require_bare_zeros(op: Op, affine: Affine) -> None:
    if op.attrs["value"] != 0.0:
        raise Refused(Reason.SHIFT_AT_PADDING, f"{op.label} pads with {op.attrs['value']}")
    no_shift(affine, Reason.SHIFT_AT_PADDING, f"{op.label} pads with zeros, which have no shift")
