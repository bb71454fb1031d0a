"""Products of two values that both depend on the data, as in attention: each sums over the other's channels.

With out = A @ V, a scale of V's columns is a scale of the output's columns, and one of A's rows is one of the
output's rows. A shift t of V's columns adds t·Σⱼ A[i, j], which is t where the rows of A sum to one: where A
is a softmax over them.
"""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op, Value
from bntool.laws.base import Context, Maps, Refused, along, constant_over, law, no_shift


@law("product")
class Product:
    """A @ V over the last two axes, batched over the others."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        left, right, rank = _factors(context, op)
        demand = along(demands[0], rank, op.label)
        if demand.scale.shape[rank - 2] == 1:
            return {right: _of_columns(context, op, demand)}
        return {left: _of_rows(context, op, demand)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        left, right, rank = _factors(context, op)
        if len(maps) > 1:
            raise Refused(Reason.NONLINEAR, f"{op.label} multiplies two values that both change")
        if right in maps:
            return [_of_columns(context, op, along(maps[right], rank, op.label))]
        return [_of_rows(context, op, along(maps[left], rank, op.label))]


@law("scaled_dot_product_attention")
class Attention:
    """Averages of the rows of `value`: softmax(query · key) @ value, where no mask can leave a row empty."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"value": _of_values(context, op, demands[0])}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        if set(maps) != {"value"}:
            raise Refused(Reason.NONLINEAR, f"{op.label} takes a softmax of what changes")
        return [_of_values(context, op, maps["value"])]


def _factors(context: Context, op: Op) -> tuple[str, str, int]:
    """The roles of A and of V, and the rank that they and the result have."""
    left, right = op.reads
    shape = context.graph.output(op).shape
    rank = len(shape)
    for role in (left, right):
        _require_batch(op, context.graph.input(op, role), shape)
    return left, right, rank


def _require_batch(op: Op, value: Value, shape: tuple[int, ...]) -> None:
    """What is broadcast over a batch axis stands for several rows at once; a vector has no rows."""
    if len(value.shape) != len(shape) or value.shape[:-2] != shape[:-2]:
        raise Refused(Reason.AXIS_MISMATCH, f"{op.label} spreads one of its operands over an axis")


def _of_columns(context: Context, op: Op, affine: Affine) -> Affine:
    """A map that goes with the columns of V, which the sum over V's rows lets by."""
    left, _ = op.reads
    affine = constant_over(affine, [affine.rank - 2], op.label)
    if not _sums_to_one(context, context.graph.input(op, left), -1):
        no_shift(affine, Reason.NONLINEAR, f"{op.label} weighs its rows by what does not sum to one")
    return affine


def _of_rows(context: Context, op: Op, affine: Affine) -> Affine:
    """A map that goes with the rows of A, which the sum over A's columns lets by."""
    _, right = op.reads
    affine = constant_over(affine, [affine.rank - 1], op.label)
    if not _sums_to_one(context, context.graph.input(op, right), -2):
        no_shift(affine, Reason.NONLINEAR, f"{op.label} weighs its columns by what does not sum to one")
    return affine


def _sums_to_one(context: Context, value: Value, axis: int) -> bool:
    """Whether `value` is a softmax over this axis, counted from the end, or one with its last two swapped."""
    producer, rank = context.graph.producer(value), len(value.shape)
    if producer is not None and producer.kind == "permute" and _swaps_the_last_two(producer, rank):
        value, axis = context.graph.input(producer), -3 - axis
        producer = context.graph.producer(value)
    return (
        producer is not None
        and producer.kind == "softmax"
        and producer.attrs.get("axis") is not None
        and producer.attrs["axis"] % rank == rank + axis
    )


def _swaps_the_last_two(op: Op, rank: int) -> bool:
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    if "swap" in op.attrs:
        return sorted(axis % rank for axis in op.attrs["swap"]) == [rank - 2, rank - 1]
    return tuple(axis % rank for axis in op.attrs["dims"]) == swapped


def _of_values(context: Context, op: Op, affine: Affine) -> Affine:
    shape = context.graph.output(op).shape
    affine = along(affine, len(shape), op.label)
    if "attn_mask" in op.inputs or op.attrs["dropout"]:
        no_shift(affine, Reason.NONLINEAR, f"{op.label} has a mask, which may leave nothing to average")
    _require_batch(op, context.graph.input(op, "value"), shape)
    return constant_over(affine, [len(shape) - 2], op.label)
