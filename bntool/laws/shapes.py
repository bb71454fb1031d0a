"""Ops that give elements another shape or order of axes: a map follows its axis through them, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op
from bntool.graph.ops import permuted_axes
from bntool.laws.base import Context, Maps, Refused, along, constant_over, law, of_input, only_input


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
        return [of_input(op, maps)]


def _require_floating(context: Context, op: Op) -> None:
    """A cast to integers rounds, and one to complex numbers is no law's business."""
    for value in (only_input(context, op), context.graph.output(op)):
        name = value.dtype.removeprefix("torch.")
        if not name.startswith(("float", "bfloat")):
            raise Refused(Reason.NONLINEAR, f"{op.label} casts to {value.dtype}")
        if torch.finfo(getattr(torch, name)).eps > context.graph.coarsest:
            what = f"{op.label} rounds to {name}, more coarsely than the weights"
            raise Refused(Reason.NONLINEAR, what)


@law("reshape", "flatten", "squeeze", "unsqueeze")
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
        return [regroup(along(of_input(op, maps), len(source), op.label), source, target)]


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
        return [along(of_input(op, maps), len(dims), op.label).then("permute", dims)]


def _dims(context: Context, op: Op) -> tuple[int, ...]:
    return permuted_axes(op.attrs, len(context.graph.input(op).shape))


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
        affine, new = along(of_input(op, maps), len(source), op.label), len(target) - len(source)
        affine = constant_over(affine, [axis - new for axis in grown if axis >= new], op.label)
        shape = tuple(affine.scale.shape)
        return [affine.then("reshape", shape, (1,) * new + shape) if new else affine]


def _grown(context: Context, op: Op) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Both shapes, and the axes of the result along which there are copies."""
    source, target = context.graph.input(op).shape, context.graph.output(op).shape
    new = len(target) - len(source)
    aligned = (1,) * new + source
    return source, target, [i for i in range(len(target)) if i < new or aligned[i] != target[i]]


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
        return [_chain(steps, along(of_input(op, maps), len(shape), op.label), shape)]


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
        return [_pixels(op, of_input(op, maps), context.graph.input(op).shape, op.attrs["factor"], False)]


@law("pixel_unshuffle")
class PixelUnshuffle:
    """The inverse of pixel shuffle: (…, c, h·r, w·r) -> (…, c·r², h, w)."""

    @staticmethod
    def up(context: Context, op: Op, demands: list[Affine]) -> Maps:
        return {"input": _pixels(op, demands[0], context.graph.output(op).shape, op.attrs["factor"], False)}

    @staticmethod
    def down(context: Context, op: Op, maps: Maps) -> list[Affine]:
        return [_pixels(op, of_input(op, maps), context.graph.input(op).shape, op.attrs["factor"], True)]


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
