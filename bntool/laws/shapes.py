"""Ops that only move elements about: a map follows its axis through them, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bntool.affine import Affine, concat, identity, merge
from bntool.graph import Op
from bntool.laws.base import Context, Maps, Refused, along, constant_over, law, only_input
from bntool.reasons import Reason


@law("identity")
class Identity:
    """Copies, eval dropout, casts to a floating type no coarser than the weights: the map passes as it is."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        _require_floating(context, op)
        return {"input": demands[0]}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        _require_floating(context, op)
        return [maps["input"]]


def _require_floating(context: Context, op: Op) -> None:
    """A cast to integers rounds, and one to complex numbers is no law's business."""
    for value in (only_input(context, op), context.graph.output(op)):
        name = value.dtype.removeprefix("torch.")
        if not name.startswith(("float", "bfloat")):
            raise Refused(Reason.NONLINEAR, f"{op.label} casts to {value.dtype}")
        if torch.finfo(getattr(torch, name)).eps > context.graph.coarsest:
            what = f"{op.label} rounds to {name}, more coarsely than the weights"
            raise Refused(Reason.NONLINEAR, what)


@law("reshape")
class Reshape:
    """view, flatten, unflatten, squeeze: axes are regrouped, elements keep their order.

    The two shapes are cut into the smallest groups of axes with equal products. Within a group the
    map is expanded and reshaped; a group it does not depend on keeps size 1.
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        source, target = context.graph.input(op).shape, context.graph.output(op).shape
        return {"input": regroup(along(demands[0], len(target), op.label), target, source)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        source, target = context.graph.input(op).shape, context.graph.output(op).shape
        return [regroup(along(maps["input"], len(source), op.label), source, target)]


def regroup(affine: Affine, source: Sequence[int], target: Sequence[int]) -> Affine:
    """The map of a value of shape `source` for the same elements in shape `target`."""
    if 0 in source:
        raise Refused(Reason.AXIS_MISMATCH, "the value has no elements")
    groups = shape_groups(source, target)
    expanded = list(affine.scale.shape)
    middle: list[int] = []
    for left, right in groups:
        touched = any(affine.scale.shape[axis] != 1 for axis in left)
        for axis in left:
            expanded[axis] = source[axis] if touched else 1
        middle += [target[axis] if touched else 1 for axis in right]
    moved = affine.then("reshape", tuple(expanded), tuple(middle))
    return _shrink(moved)


def _shrink(affine: Affine) -> Affine:
    """Size 1 along every axis over which the map is in fact constant."""
    for axis in affine.depends_on():
        try:
            affine = constant_over(affine, [axis], "a reshape")
        except Refused:
            continue
    return affine


def shape_groups(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal size into the smallest runs of axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        left, right = [], []
        a = b = 1
        if i < len(source):
            left, a, i = [i], source[i], i + 1
        if j < len(target):
            right, b, j = [j], target[j], j + 1
        while a != b:
            if a < b:
                if i == len(source):
                    raise Refused(Reason.AXIS_MISMATCH, f"{list(source)} is not {list(target)} regrouped")
                left.append(i)
                a, i = a * source[i], i + 1
            else:
                if j == len(target):
                    raise Refused(Reason.AXIS_MISMATCH, f"{list(source)} is not {list(target)} regrouped")
                right.append(j)
                b, j = b * target[j], j + 1
        groups.append((left, right))
    return groups


@law("permute")
class Permute:
    """transpose, permute: the map's axes are permuted alike."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        dims = _dims(context, op)
        inverse = tuple(dims.index(axis) for axis in range(len(dims)))
        return {"input": along(demands[0], len(dims), op.label).then("permute", inverse)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        dims = _dims(context, op)
        return [along(maps["input"], len(dims), op.label).then("permute", tuple(dims))]


def _dims(context: Context, op: Op) -> list[int]:
    rank = len(context.graph.input(op).shape)
    if "swap" in op.attrs:
        dims = list(range(rank))
        if rank > 1:
            a, b = (axis % rank for axis in op.attrs["swap"])
            dims[a], dims[b] = dims[b], dims[a]
        return dims
    return [axis % rank for axis in op.attrs["dims"]]


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
        affine = along(maps["input"], len(shape), op.label)
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
    """

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape, axis, indices = _picked(context, op)
        demand = along(demands[0], len(shape), op.label)
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
        shape, axis, indices = _picked(context, op)
        affine = along(maps["input"], len(shape), op.label)
        return [affine if affine.scale.shape[axis] == 1 else affine.then("take", axis, indices)]


def _picked(context: Context, op: Op) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    shape = context.graph.input(op).shape
    axis = op.attrs["axis"] % len(shape)
    indices = op.attrs.get("indices")
    if indices is None:
        value = context.graph.input(op, "index")
        known = context.graph.constant(value) if value.constant else None
        if known is None or known.dim() > 1:
            raise Refused(Reason.UNKNOWN_OP, f"what {op.label} picks is not known")
        indices = known.reshape(-1).tolist()
    return shape, axis, tuple(int(i) % shape[axis] for i in indices)


@law("expand", "repeat")
class Repeat:
    """expand, repeat, tile: copies along axes that the map does not depend on; new axes come first."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        source, target, grown = _grown(context, op)
        demand = constant_over(along(demands[0], len(target), op.label), grown, op.label)
        new = len(target) - len(source)
        shape = tuple(demand.scale.shape)
        return {"input": demand.then("reshape", shape, shape[new:]) if new else demand}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        source, target, grown = _grown(context, op)
        affine, new = along(maps["input"], len(source), op.label), len(target) - len(source)
        affine = constant_over(affine, [axis - new for axis in grown if axis >= new], op.label)
        shape = tuple(affine.scale.shape)
        return [affine.then("reshape", shape, (1,) * new + shape) if new else affine]


def _grown(context: Context, op: Op) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Both shapes, and the axes of the result along which there are copies."""
    source, target = context.graph.input(op).shape, context.graph.output(op).shape
    new = len(target) - len(source)
    aligned = (1,) * new + source
    return source, target, [i for i in range(len(target)) if i < new or aligned[i] != target[i]]


@law("select")
class Select:
    """One index of an axis, which goes. A map that varies along that axis keeps that index's part."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape, axis, index = _selected(context, op)
        demand = along(demands[0], len(shape) - 1, op.label)
        kept = list(demand.scale.shape)
        kept.insert(axis, 1)
        placed = demand.then("reshape", tuple(demand.scale.shape), tuple(kept))
        return {"input": placed.then("embed", axis, shape[axis], index, index + 1, 1)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape, axis, index = _selected(context, op)
        affine = along(maps["input"], len(shape), op.label)
        if affine.scale.shape[axis] != 1:
            affine = affine.then("slice", axis, index, index + 1, 1)
        kept = [n for i, n in enumerate(affine.scale.shape) if i != axis]
        return [affine.then("reshape", tuple(affine.scale.shape), tuple(kept))]


def _selected(context: Context, op: Op) -> tuple[tuple[int, ...], int, int]:
    shape = context.graph.input(op).shape
    axis = op.attrs["axis"] % len(shape)
    return shape, axis, op.attrs["index"] % shape[axis]


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
        affine = along(maps["input"], rank, op.label)
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
            if not part.is_identity:
                if context.graph.input(op, role).constant:
                    raise Refused(Reason.MIXED_BRANCHES, f"a part of {op.label} is a constant")
                context.require_nothing_later(context.graph.input(op, role))
            maps[role] = part
        return maps

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        rank, axis, roles, sizes = _joined(context, op)
        parts = [along(maps.get(role, identity(rank)), rank, op.label) for role in roles]
        return [concat(parts, axis, sizes)]


def _joined(context: Context, op: Op) -> tuple[int, int, list[str], list[int]]:
    rank = len(context.graph.output(op).shape)
    axis = op.attrs["axis"] % rank
    roles = list(op.inputs)
    shapes = [context.graph.input(op, role).shape for role in roles]
    if any(len(shape) != rank for shape in shapes):
        raise Refused(Reason.UNKNOWN_OP, f"{op.label} joins values of different ranks")
    return rank, axis, roles, [shape[axis] for shape in shapes]


def _chain(steps: list[tuple[str, tuple[int, ...]]], affine: Affine, shape: Sequence[int]) -> Affine:
    """Reshapes and permutations applied in turn to a value of `shape`."""
    current = tuple(shape)
    for kind, argument in steps:
        if kind == "reshape":
            affine = regroup(affine, current, argument)
            current = argument
        else:
            affine = affine.then("permute", argument)
            current = tuple(current[d] for d in argument)
    return affine


@law("channel_shuffle")
class ChannelShuffle:
    """(N, g·c, …) -> (N, g, c, …) -> (N, c, g, …) -> (N, c·g, …) (Zhang et al. 2018, ShuffleNet)."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        shape = context.graph.input(op).shape
        groups = op.attrs["groups"]
        steps = _shuffle(shape, shape[1] // groups, groups)
        return {"input": _chain(steps, along(demands[0], len(shape), op.label), shape)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        shape = context.graph.input(op).shape
        groups = op.attrs["groups"]
        steps = _shuffle(shape, groups, shape[1] // groups)
        return [_chain(steps, along(maps["input"], len(shape), op.label), shape)]


def _shuffle(shape: Sequence[int], outer: int, inner: int) -> list[tuple[str, tuple[int, ...]]]:
    rest = tuple(shape[2:])
    axes = tuple(range(3, 3 + len(rest)))
    return [
        ("reshape", (shape[0], outer, inner, *rest)),
        ("permute", (0, 2, 1, *axes)),
        ("reshape", tuple(shape)),
    ]


@law("pixel_shuffle")
class PixelShuffle:
    """(…, c·r², h, w) -> (…, c, h·r, w·r) (Shi et al. 2016)."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _pixels(op, demands[0], context.graph.output(op).shape, op.attrs["factor"], True)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_pixels(op, maps["input"], context.graph.input(op).shape, op.attrs["factor"], False)]


@law("pixel_unshuffle")
class PixelUnshuffle:
    """The inverse of pixel shuffle: (…, c, h·r, w·r) -> (…, c·r², h, w)."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _pixels(op, demands[0], context.graph.output(op).shape, op.attrs["factor"], False)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_pixels(op, maps["input"], context.graph.input(op).shape, op.attrs["factor"], True)]


def _pixels(op: Op, affine: Affine, shape: Sequence[int], r: int, gather: bool) -> Affine:
    """Move a map between the two sides; `gather` goes from the large image to the many channels."""
    affine = along(affine, len(shape), op.label)
    *lead, c, h, w = shape
    n = len(lead)
    keep = tuple(range(n))
    steps: list[tuple[str, tuple[int, ...]]]
    if gather:
        steps = [
            ("reshape", (*lead, c, h // r, r, w // r, r)),
            ("permute", (*keep, n, n + 2, n + 4, n + 1, n + 3)),
            ("reshape", (*lead, c * r * r, h // r, w // r)),
        ]
    else:
        steps = [
            ("reshape", (*lead, c // (r * r), r, r, h, w)),
            ("permute", (*keep, n, n + 3, n + 1, n + 4, n + 2)),
            ("reshape", (*lead, c // (r * r), h * r, w * r)),
        ]
    return _chain(steps, affine, shape)
