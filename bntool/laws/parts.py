"""Ops that take an axis apart, put one together, or reorder one: each part keeps its part of the map."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, concat, identity, merge
from bntool.graph.dataflow import Op
from bntool.laws.base import Context, Maps, Refused, along, constant_over, law, of_input


@law("slice")
class Slice:
    """A part of one axis. Upstream, the rest of the axis is nobody's demand (NaN) from here."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape = context.graph.input(op).shape
        axis, start, stop, step = _span(op, shape)
        demand = along(demands[0], len(shape), op.label)
        return {"input": demand.then("embed", axis, shape[axis], start, stop, step)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape = context.graph.input(op).shape
        axis, start, stop, step = _span(op, shape)
        affine = along(of_input(op, maps), len(shape), op.label)
        if affine.scale.shape[axis] == 1:
            return [affine]
        return [affine.then("slice", axis, start, stop, step)]


def _span(op: Op, shape: Sequence[int]) -> tuple[int, int, int, int]:
    axis = op.attrs["axis"] % len(shape)
    start, stop, step = slice(op.attrs["start"], op.attrs["stop"], op.attrs["step"]).indices(shape[axis])
    return axis, start, stop, step


@law("index_select")
class IndexSelect:
    """Some entries of one axis, in an order that is known. Upstream, an entry that goes to several places
    must be asked for one thing; one that goes nowhere is nobody's demand (NaN).

    Which entries they are matters only to a map that varies along that axis: elsewhere the data may say it.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape, axis = _picked_from(context, op)
        demand = along(demands[0], len(shape), op.label)
        indices = _picked(context, op, shape[axis])
        if indices is None:
            return {"input": constant_over(demand, [axis], op.label)}
        if demand.scale.shape[axis] == 1:
            widened = [*demand.scale.shape[:axis], len(indices), *demand.scale.shape[axis + 1 :]]
            demand = demand.then("reshape", tuple(widened), tuple(widened))
        asked = demand.then("put", axis, shape[axis], indices)
        back = asked.then("take", axis, indices)
        if merge(back, demand) is None:
            raise Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{op.label} picks one entry for several places")
        return {"input": asked}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape, axis = _picked_from(context, op)
        affine = along(of_input(op, maps), len(shape), op.label)
        if affine.scale.shape[axis] == 1:
            return [affine]
        indices = _picked(context, op, shape[axis])
        if indices is None:
            raise Refused(Reason.UNKNOWN_OP, f"what {op.label} picks is not known")
        return [affine.then("take", axis, indices)]


def _picked_from(context: Context, op: Op) -> tuple[tuple[int, ...], int]:
    """The shape that is picked from and the axis; refused where the axis does not stay where it is."""
    shape = context.graph.input(op).shape
    lists = [context.graph.input(op, role).shape for role in op.reads if role != "input"]
    if len(context.graph.output(op).shape) != len(shape) or any(len(places) > 1 for places in lists):
        raise Refused(Reason.AXIS_MISMATCH, f"{op.label} picks along more than one axis")
    return shape, op.attrs["axis"] % len(shape)


def _picked(context: Context, op: Op, size: int) -> tuple[int, ...] | None:
    """Where in an axis of `size` each entry comes from; None where that is not known."""
    indices = op.attrs.get("indices")
    if "repeats" in op.attrs:
        indices = [entry for entry in range(size) for _ in range(op.attrs["repeats"])]
    if indices is None:
        (role,) = (role for role in op.reads if role != "input")
        known = context.graph.constant(context.graph.input(op, role))
        if known is None:
            return None
        mask = known.dtype in (torch.bool, torch.uint8)
        indices = (known.nonzero() if mask else known).reshape(-1).tolist()
    return tuple(int(i) % size for i in indices)


@law("flip", "roll")
class Reorder:
    """The entries of some axes, each in another place."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _reordered(context, op, demands[0], back=True)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_reordered(context, op, of_input(op, maps), back=False)]


def _reordered(context: Context, op: Op, affine: Affine, *, back: bool) -> Affine:
    shape = context.graph.input(op).shape
    affine = along(affine, len(shape), op.label)
    if not op.attrs["axes"]:  # rolled as if it had a single axis
        return constant_over(affine, list(range(len(shape))), op.label)
    shifts = op.attrs.get("shifts", (None,) * len(op.attrs["axes"]))
    for axis, shift in zip((axis % len(shape) for axis in op.attrs["axes"]), shifts, strict=True):
        n = shape[axis]
        if affine.scale.shape[axis] == 1:
            continue
        order = range(n)[::-1] if shift is None else [(i - shift) % n for i in range(n)]
        affine = affine.then("take", axis, tuple(map(order.index, range(n)) if back else order))
    return affine


@law("select")
class Select:
    """One index of an axis, which goes. A map that varies along that axis keeps that index's part."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape, axis, index = _selected(context, op)
        placed = _with_axis(along(demands[0], len(shape) - 1, op.label), axis)
        return {"input": placed.then("embed", axis, shape[axis], index, index + 1, 1)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape, axis, index = _selected(context, op)
        return [_at(along(of_input(op, maps), len(shape), op.label), axis, index)]


def _selected(context: Context, op: Op) -> tuple[tuple[int, ...], int, int]:
    shape = context.graph.input(op).shape
    axis = op.attrs["axis"] % len(shape)
    return shape, axis, op.attrs["index"] % shape[axis]


def _with_axis(affine: Affine, axis: int) -> Affine:
    """The map of a value to which an axis of size 1 is added."""
    shape = tuple(affine.scale.shape)
    return affine.then("reshape", shape, (*shape[:axis], 1, *shape[axis:]))


def _at(affine: Affine, axis: int, index: int) -> Affine:
    """The map of one entry of an axis, which goes."""
    if affine.scale.shape[axis] != 1:
        affine = affine.then("slice", axis, index, index + 1, 1)
    shape = tuple(affine.scale.shape)
    return affine.then("reshape", shape, shape[:axis] + shape[axis + 1 :])


@law("unbind")
class Unbind:
    """Every entry of an axis as a value of its own, without the axis."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        rank = len(context.graph.input(op).shape)
        axis = op.attrs["axis"] % rank
        parts = [_with_axis(along(demand, rank - 1, op.label), axis) for demand in demands]
        return {"input": concat(parts, axis, [1] * len(parts))}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank = len(context.graph.input(op).shape)
        affine = along(of_input(op, maps), rank, op.label)
        return [_at(affine, op.attrs["axis"] % rank, index) for index in range(len(op.outputs))]


@law("unfold")
class Windows:
    """Tensor.unfold: overlapping windows along an axis that the map does not depend on; a last axis counts
    the entries of a window.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        rank = len(context.graph.input(op).shape)
        demand = along(demands[0], rank + 1, op.label)
        demand = constant_over(demand, [op.attrs["axis"] % rank, rank], op.label)
        return {"input": _at(demand, rank, 0)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank = len(context.graph.input(op).shape)
        affine = along(of_input(op, maps), rank, op.label)
        return [_with_axis(constant_over(affine, [op.attrs["axis"] % rank], op.label), rank)]


@law("stack")
class Stack:
    """Values of one shape along a new axis."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        rank = len(context.graph.output(op).shape)
        demand, axis = along(demands[0], rank, op.label), op.attrs["axis"] % rank
        parts = {role: _at(demand, axis, index) for index, role in enumerate(op.reads)}
        for role, part in parts.items():
            _require_open(context, op, role, part)
        return parts

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank = len(context.graph.output(op).shape)
        axis = op.attrs["axis"] % rank
        parts = [along(maps.get(role, identity(rank - 1)), rank - 1, op.label) for role in op.reads]
        return [concat([_with_axis(part, axis) for part in parts], axis, [1] * len(parts))]


@law("split")
class Split:
    """chunk, split: parts laid end to end along one axis."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        rank, axis, sizes = _parts(context, op)
        return {"input": concat([along(d, rank, op.label) for d in demands], axis, sizes)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank, axis, sizes = _parts(context, op)
        affine = along(of_input(op, maps), rank, op.label)
        if affine.scale.shape[axis] == 1:
            return [affine] * len(sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [affine.then("slice", axis, a, a + n, 1) for a, n in zip(starts, sizes, strict=True)]


def _parts(context: Context, op: Op) -> tuple[int, int, list[int]]:
    rank = len(context.graph.input(op).shape)
    axis = op.attrs["axis"] % rank
    return rank, axis, [context.graph.values[v].shape[axis] for v in op.outputs]


@law("concat")
class Concat:
    """Parts joined along one axis: each part takes its own slice of the map."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        rank, axis, roles, sizes = _joined(context, op)
        demand = along(demands[0], rank, op.label)
        maps: Maps = {}
        start = 0
        for role, size in zip(roles, sizes, strict=True):
            part = (
                demand
                if demand.scale.shape[axis] == 1
                else demand.then("slice", axis, start, start + size, 1)
            )
            start += size
            _require_open(context, op, role, part)
            maps[role] = part
        return maps

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank, axis, roles, sizes = _joined(context, op)
        parts = [along(maps.get(role, identity(rank)), rank, op.label) for role in roles]
        return [concat(parts, axis, sizes)]


def _require_open(context: Context, op: Op, role: str, part: Affine) -> None:
    """A part that must change is no constant."""
    if part.is_identity:
        return
    if context.graph.input(op, role).constant:
        raise Refused(Reason.MIXED_BRANCHES, f"a part of {op.label} is a constant")


def _joined(context: Context, op: Op) -> tuple[int, int, list[str], list[int]]:
    rank = len(context.graph.output(op).shape)
    axis = op.attrs["axis"] % rank
    roles = op.reads
    shapes = [context.graph.input(op, role).shape for role in roles]
    if any(len(shape) != rank for shape in shapes):
        raise Refused(Reason.UNKNOWN_OP, f"{op.label} joins values of different ranks")
    return rank, axis, roles, [shape[axis] for shape in shapes]
