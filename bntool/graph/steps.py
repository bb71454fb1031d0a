"""The steps by which an affine map moves, on pairs of tensors, and a map computed again from its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.core.sites import Expr

Pair = tuple[Tensor, Tensor]
Leaf = Callable[[str, str], Any]
"""Resolves a leaf: `("bn", name)` to a pair of vectors, `("tensor", handle)` to a tensor."""


def numbers_of(tensor: Tensor) -> Tensor:
    """In float64 on the CPU, wherever the model is: maps are small."""
    return tensor.detach().to("cpu", torch.float64)


def identity_pair(rank: int) -> Pair:
    one = torch.ones([1] * rank, dtype=torch.float64, device="cpu")
    return one, torch.zeros_like(one)


def broadcast(first: Tensor, second: Tensor) -> Pair:
    both: Pair = torch.broadcast_tensors(first, second)
    return both


def _broadcast_shapes(shapes: Sequence[Sequence[int]]) -> Sequence[int]:
    shape: torch.Size = torch.broadcast_shapes(*shapes)
    return shape


# -- primitive steps: each maps a pair to a pair; all are replayed by `evaluate` ------------------------


def _place(scale: Tensor, shift: Tensor, rank: int, axis: int) -> Pair:
    """A vector of channels as a map over `axis` of a value of `rank` axes."""
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape), shift.reshape(shape)


def _scale_part(scale: Tensor, shift: Tensor) -> Pair:
    return scale, torch.zeros_like(shift)


def _shift_part(scale: Tensor, shift: Tensor) -> Pair:
    return torch.ones_like(scale), shift


def _unscaled_shift(scale: Tensor, shift: Tensor) -> Pair:
    """The shift as it stands before the scale, x + t/s. Where s = 0 nothing of x is left to shift."""
    return torch.ones_like(scale), shift / scale


def _size(scale: Tensor, shift: Tensor) -> Pair:
    """|s|, by which a spread grows; it knows of no shift."""
    return scale.abs(), torch.zeros_like(shift)


def _square(scale: Tensor, shift: Tensor) -> Pair:
    return scale.square(), torch.zeros_like(shift)


def _root(scale: Tensor, shift: Tensor) -> Pair:
    """The scale before a square; only asked where it is not negative."""
    return scale.sqrt(), torch.zeros_like(shift)


def _inverse(scale: Tensor, shift: Tensor) -> Pair:
    """(x − t)/s, which undoes s·x + t."""
    return 1 / scale, -shift / scale


def _constant(scale: Tensor, _shift: Tensor) -> Pair:
    """The scale as a summand: the same numbers whatever x is."""
    return torch.zeros_like(scale), scale


def _slope(scale: Tensor, shift: Tensor, slope: Tensor) -> Pair:
    """What turns a slope over where the scale is negative: a·(1/a²) = 1/a."""
    kept = torch.where(torch.isnan(scale), scale, torch.ones_like(scale))
    return broadcast(torch.where(scale < 0, slope**-2, kept), torch.zeros_like(shift))


def _turn(scale: Tensor, shift: Tensor, slope: Tensor) -> Pair:
    """The scale on the other side of a PReLU whose slope was turned over: a·s where s is negative."""
    return broadcast(torch.where(scale < 0, slope * scale, scale), shift)


def _reshape(scale: Tensor, shift: Tensor, expanded: Sequence[int], shape: Sequence[int]) -> Pair:
    """Expand to `expanded`, then reshape to `shape`."""
    return (
        scale.expand(tuple(expanded)).reshape(tuple(shape)),
        shift.expand(tuple(expanded)).reshape(tuple(shape)),
    )


def _collapse(scale: Tensor, shift: Tensor, axis: int) -> Pair:
    """Size 1 along an axis over which the map is constant, wherever anybody asks for it."""
    return first_asked(scale, axis), first_asked(shift, axis)


def first_asked(part: Tensor, axis: int) -> Tensor:
    """The first entry along `axis` that is not NaN ("nobody asks"); NaN where there is none."""
    return part.gather(axis, torch.isnan(part).to(torch.uint8).argmin(axis, keepdim=True))


def _permute(scale: Tensor, shift: Tensor, dims: Sequence[int]) -> Pair:
    return scale.permute(tuple(dims)), shift.permute(tuple(dims))


def _slice(scale: Tensor, shift: Tensor, axis: int, start: int, stop: int, step: int) -> Pair:
    index = [slice(None)] * scale.dim()
    index[axis] = slice(start, stop, step)
    return scale[tuple(index)], shift[tuple(index)]


def _embed(scale: Tensor, shift: Tensor, axis: int, size: int, start: int, stop: int, step: int) -> Pair:
    """The map on a part of an axis of `size`; NaN, "nobody asks", on the rest."""
    shape = list(scale.shape)
    shape[axis] = size
    index = [slice(None)] * scale.dim()
    index[axis] = slice(start, stop, step)
    both = []
    for part in (scale, shift):
        whole = torch.full(shape, torch.nan, dtype=torch.float64)
        whole[tuple(index)] = part
        both.append(whole)
    return both[0], both[1]


def _take(scale: Tensor, shift: Tensor, axis: int, indices: Sequence[int]) -> Pair:
    """The entries at `indices` along an axis, in that order."""
    chosen = torch.tensor(tuple(indices), dtype=torch.int64)
    return scale.index_select(axis, chosen), shift.index_select(axis, chosen)


def _put(scale: Tensor, shift: Tensor, axis: int, size: int, indices: Sequence[int]) -> Pair:
    """The entries at their places on an axis of `size`, the first for each; NaN, "nobody asks", elsewhere."""
    both = []
    for part in (scale, shift):
        whole = torch.full(
            [*part.shape[:axis], size, *part.shape[axis + 1 :]], torch.nan, dtype=torch.float64
        )
        for position in reversed(range(len(indices))):
            asked = part.select(axis, position)
            place = whole.select(axis, indices[position])
            place.copy_(torch.where(torch.isnan(asked), place, asked))
        both.append(whole)
    return both[0], both[1]


def _fill(scale: Tensor, shift: Tensor) -> Pair:
    """The identity where nobody asked for anything."""
    return torch.nan_to_num(scale, nan=1.0), torch.nan_to_num(shift, nan=0.0)


def _divide_shift(scale: Tensor, shift: Tensor, by: Tensor) -> Pair:
    """Before y = c·x the same map is (s, t/c)."""
    return broadcast(scale, shift / by)


def _multiply_shift(scale: Tensor, shift: Tensor, by: Tensor) -> Pair:
    """After y = c·x the same map is (s, c·t)."""
    return broadcast(scale, shift * by)


def _before_add(scale: Tensor, shift: Tensor, constant: Tensor, factor: float) -> Pair:
    """s·(x + c) + t = (s·x + s·c + t − c) + c: the map on x that leaves the added constant alone."""
    c = factor * constant
    return broadcast(scale, shift + scale * c - c)


def _after_add(scale: Tensor, shift: Tensor, constant: Tensor, factor: float) -> Pair:
    """(s·x + t) + c = s·(x + c) + t + c − s·c: the map behind the added constant."""
    c = factor * constant
    return broadcast(scale, shift + c - scale * c)


def _times(scale: Tensor, shift: Tensor, by: Tensor, power: int) -> Pair:
    """c·(s·x + t), or with a power of −1 the quotient."""
    return broadcast(scale * by**power, shift * by**power)


def _plus(scale: Tensor, shift: Tensor, constant: Tensor, factor: float) -> Pair:
    """s·x + t + f·c."""
    return broadcast(scale, shift + factor * constant)


PRIMITIVES: dict[str, Callable[..., Pair]] = {
    "place": _place,
    "scale_part": _scale_part,
    "shift_part": _shift_part,
    "unscaled_shift": _unscaled_shift,
    "size": _size,
    "square": _square,
    "root": _root,
    "inverse": _inverse,
    "constant": _constant,
    "slope": _slope,
    "turn": _turn,
    "reshape": _reshape,
    "collapse": _collapse,
    "permute": _permute,
    "slice": _slice,
    "embed": _embed,
    "take": _take,
    "put": _put,
    "fill": _fill,
    "divide_shift": _divide_shift,
    "multiply_shift": _multiply_shift,
    "before_add": _before_add,
    "after_add": _after_add,
    "times": _times,
    "plus": _plus,
}


# -- steps that join several maps -----------------------------------------------------------------------


def compose_pairs(outer: Pair, inner: Pair) -> Pair:
    return outer[0] * inner[0], outer[0] * inner[1] + outer[1]


def together_pairs(first: Pair, second: Pair) -> Pair:
    """The sum of two maps of one value."""
    return first[0] + second[0], first[1] + second[1]


def merge_pairs(first: Pair, second: Pair) -> Pair:
    pairs = [
        torch.where(torch.isnan(x), y, x)
        for x, y in (broadcast(a, b) for a, b in zip(first, second, strict=True))
    ]
    return pairs[0], pairs[1]


def concat_pairs(pairs: Sequence[Pair], axis: int, sizes: Sequence[int]) -> Pair:
    shape = list(_broadcast_shapes([_without(p[0].shape, axis) for p in pairs]))
    both = []
    for which in (0, 1):
        parts = []
        for pair, size in zip(pairs, sizes, strict=True):
            target = list(shape)
            target[axis] = size
            parts.append(pair[which].expand(target))
        both.append(torch.cat(parts, dim=axis))
    return both[0], both[1]


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [1 if i == axis else n for i, n in enumerate(shape)]


def add_pairs(first: Pair, second: Pair) -> Pair:
    scale, _ = broadcast(first[0], second[0])
    shift = first[1] + second[1]
    return broadcast(scale, shift)


_JOINS = {"compose": compose_pairs, "merge": merge_pairs, "add": add_pairs, "together": together_pairs}


def evaluate(expr: Expr, leaf: Leaf) -> Pair:
    """Compute a map again from its expression, with the leaves taken from a model."""
    name = expr[0]
    if name == "bn":
        pair: Pair = leaf("bn", expr[1])
        return pair
    if name == "identity":
        return identity_pair(expr[1])
    if name in _JOINS:
        return _JOINS[name](evaluate(expr[1], leaf), evaluate(expr[2], leaf))
    if name == "concat":
        return concat_pairs([evaluate(e, leaf) for e in expr[3:]], expr[1], expr[2])
    scale, shift = evaluate(expr[1], leaf)
    args = [_argument(a, leaf) for a in expr[2:]]
    return PRIMITIVES[name](scale, shift, *args)


def _argument(value: Any, leaf: Leaf) -> Any:
    """A step's argument: a constant tensor by handle or by value, or a plain argument."""
    if isinstance(value, tuple) and value and value[0] == "tensor":
        return numbers_of(leaf("tensor", value[1])).reshape(value[2])
    if isinstance(value, tuple) and value and value[0] == "number":
        return torch.tensor(value[1], dtype=torch.float64).reshape(value[2])
    return value
