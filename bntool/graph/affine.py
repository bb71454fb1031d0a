"""Per-channel affine maps y = s·x + t, and the arithmetic by which they move.

A BatchNorm in eval mode is such a map, with s = γ/√(σ²+ε) and t = β − s·μ (Ioffe & Szegedy 2015,
algorithm 2). A map over a value of rank r is held as two float64 tensors of rank r that broadcast
against it: size 1 on every axis the map does not depend on. So one arithmetic serves vectors of
channels, flattened maps and shuffled groups alike.

Every map also carries the expression it came from, so that a plan can be saved and replayed on other
weights: `evaluate(expr, leaf)` computes the same steps again from the model's own tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.core.sites import Expr
from bntool.graph.steps import (
    PRIMITIVES,
    Pair,
    add_pairs,
    broadcast,
    compose_pairs,
    concat_pairs,
    identity_pair,
    merge_pairs,
    numbers_of,
    together_pairs,
)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant operand: its numbers in float64, shaped to broadcast, and how a plan names it.

    The literal is `("tensor", handle, shape)` for the model's own tensors, `("number", values, shape)`
    for anything else.
    """

    tensor: Tensor
    literal: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor, handle: str, rank: int) -> Constant:
        shape = (1,) * (rank - tensor.dim()) + tuple(tensor.shape)
        numbers = numbers_of(tensor).reshape(shape)
        if handle:
            return cls(numbers, ("tensor", handle, shape))
        return cls(numbers, ("number", tuple(numbers.reshape(-1).tolist()), shape))


@dataclasses.dataclass(frozen=True)
class Affine:
    """y = scale·x + shift, with both tensors in float64 and broadcastable to the value."""

    scale: Tensor
    shift: Tensor
    expr: Expr

    @property
    def rank(self) -> int:
        return self.scale.dim()

    @functools.cached_property
    def has_shift(self) -> bool:
        return _differs(self.shift, 0.0)

    @functools.cached_property
    def has_scale(self) -> bool:
        return _differs(self.scale, 1.0)

    @functools.cached_property
    def is_partial(self) -> bool:
        """Whether nobody asks for anything (NaN) somewhere."""
        return bool(torch.isnan(self.scale).any())  # and of the shift where of the scale

    @property
    def is_identity(self) -> bool:
        return not self.has_scale and not self.has_shift

    def equals(self, other: Affine) -> bool:
        return torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift)

    def then(self, name: str, *args: Any) -> Affine:
        """This map after one primitive step."""
        scale, shift = PRIMITIVES[name](self.scale, self.shift, *args)
        return Affine(scale, shift, (name, self.expr, *args))

    def then_constant(self, name: str, constant: Constant, *args: Any) -> Affine:
        """This map after a primitive step with a constant tensor of the model."""
        scale, shift = PRIMITIVES[name](self.scale, self.shift, constant.tensor, *args)
        return Affine(scale, shift, (name, self.expr, constant.literal, *args))

    def depends_on(self) -> list[int]:
        """The axes along which the map is not constant in shape."""
        return [axis for axis, size in enumerate(self.scale.shape) if size != 1]


def _differs(numbers: Tensor, number: float) -> bool:
    """Whether any number that is not NaN is another one. The extremes tell, where none is NaN: planning asks
    for each map that it makes, and one op is the least that it can ask by.
    """
    if not numbers.numel():
        return False
    least, most = map(float, torch.aminmax(numbers))
    if math.isnan(least):
        return bool((torch.nan_to_num(numbers, nan=number) != number).any())
    return least != number or most != number


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Pair:
    """Scale and shift of a BatchNorm in eval mode, as float64 vectors of length C.

    s = γ/√(σ²+ε), t = β − s·μ. `weight` None means γ = 1, `bias` None means β = 0.
    """
    scale = (numbers_of(variance) + eps).rsqrt()
    if weight is not None:
        scale = scale * numbers_of(weight)
    shift = -scale * numbers_of(mean)
    if bias is not None:
        shift = shift + numbers_of(bias)
    return scale, shift


def is_finite(pair: Pair) -> bool:
    """Whether a map is finite everywhere; its extremes tell, for NaN is the least and the largest of any."""
    least, largest = torch.aminmax(pair[0] + pair[1])
    return math.isfinite(least) and math.isfinite(largest)


@functools.cache
def identity(rank: int) -> Affine:
    return Affine(*identity_pair(rank), ("identity", rank))


def condition(affine: Affine) -> float:
    """By how much undoing x → s·x + t can magnify what rounding did.

    (1 + |s| + |t|)·(1 + |1/s| + |t/s|) bounds it for each channel; where s = 0 it is infinite, and of
    a map that changes nothing it is four.
    """
    scale, shift = affine.scale.abs(), affine.shift.abs()
    found = (1 + scale + shift) * (1 + (1 + shift) / scale)
    return math.inf if bool((scale == 0).any()) else float(found.max())


# -- steps that join several maps -----------------------------------------------------------------------


def compose(outer: Affine, inner: Affine) -> Affine:
    """outer(inner(x)): scale so·si, shift so·ti + to."""
    scale, shift = compose_pairs((outer.scale, outer.shift), (inner.scale, inner.shift))
    return Affine(scale, shift, ("compose", outer.expr, inner.expr))


def merge(first: Affine, second: Affine) -> Affine | None:
    """The map that both readers of a value agree on; None where they ask for different things."""
    if first.equals(second):
        return first
    for a, b in ((first.scale, second.scale), (first.shift, second.shift)):
        if not bool((torch.isnan(a) | torch.isnan(b) | (a == b)).all()):
            return None
    for either in (first, second):
        if not either.is_partial:
            return either
    scale, shift = merge_pairs((first.scale, first.shift), (second.scale, second.shift))
    return Affine(scale, shift, ("merge", first.expr, second.expr))


def concat(maps: Sequence[Affine], axis: int, sizes: Sequence[int]) -> Affine:
    """The maps of parts laid end to end along `axis`."""
    pairs = [(m.scale, m.shift) for m in maps]
    scale, shift = concat_pairs(pairs, axis, sizes)
    return Affine(scale, shift, ("concat", axis, tuple(sizes), *(m.expr for m in maps)))


def add(first: Affine, second: Affine) -> Affine | None:
    """s·a + t₁ + s·b + t₂ = s·(a + b) + t₁ + t₂; None where the scales differ."""
    a, b = broadcast(first.scale, second.scale)
    if not torch.equal(a, b):
        return None
    scale, shift = add_pairs((first.scale, first.shift), (second.scale, second.shift))
    return Affine(scale, shift, ("add", first.expr, second.expr))


def together(first: Affine, second: Affine) -> Affine:
    """(s₁·x + t₁) + (s₂·x + t₂): two maps of one value, added."""
    scale, shift = together_pairs((first.scale, first.shift), (second.scale, second.shift))
    return Affine(scale, shift, ("together", first.expr, second.expr))
