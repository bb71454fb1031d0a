"""The arithmetic of a fold's edits: in float64, with one cast to the storage type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bntool.graph.steps import Pair

_CHUNK = 1 << 15
"""Elements of a weight worked on at a time, so that they stay in a core's own cache in float64."""


def scaled(weight: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The product of a weight and all factors in float64, cast to `dtype` once.

    Each factor broadcasts against the weight. A large weight goes in chunks along the first axis; one float64
    buffer serves all of them: three times as fast as a new one for each. None is needed where float64 is
    asked for. The memory format stays.
    """
    if weight.numel() <= _CHUNK:
        return _multiplied(weight.to(torch.float64, copy=True), factors).to(dtype)
    out = torch.empty_like(weight, dtype=dtype)
    step = max(1, _CHUNK * weight.shape[0] // weight.numel())
    buffer = None if dtype == torch.float64 else torch.empty_like(weight[:step], dtype=torch.float64)
    for start in range(0, weight.shape[0], step):
        chunk = slice(start, start + step)
        place = out[chunk] if buffer is None else buffer[: min(step, weight.shape[0] - start)]
        _multiplied(place.copy_(weight[chunk]), [f[chunk] if len(f) > 1 else f for f in factors])
        if buffer is not None:
            out[chunk].copy_(place)
    return out


def _multiplied(numbers: Tensor, factors: Sequence[Tensor]) -> Tensor:
    for factor in factors:
        numbers.mul_(factor)
    return numbers


def cast_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The storage type and device of `like`, rounded once; its memory format too."""
    made = tensor.to(like.dtype).to(like.device)
    if made.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return made.contiguous(memory_format=torch.channels_last)
    return made.contiguous()


def norm_taking_in(
    kind: str, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, pair: Pair
) -> Pair:
    """γ and β, in float64 as all of these are, of a BatchNorm that stays and takes a map in.

    Output side (`scale_output`): γ' = s·γ, β' = s·β + t. Input side, with S = γ/√(σ²+ε): γ' = γ·s and
    β' = β + S·(t − μ + s·μ), so that BN'(x) = BN(s·x + t). The statistics stay.
    """
    scale, shift = pair
    if kind == "scale_output":
        return scale * gamma, scale * beta + shift
    own = gamma * (variance + eps).rsqrt()
    return gamma * scale, beta + own * (shift - mean + scale * mean)
