"""Carry out one edit of a fold on tensors: float64 arithmetic, one cast to the storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from bntool.affine import Pair
from bntool.laws.taking import bias_from_input_shift, rows
from bntool.plan import Edit

_CHUNK = 1 << 18
"""Elements of a weight worked on at a time, so that the float64 copy stays in the cache."""


def edited(edit: Edit, weight: Tensor, bias: Tensor | None, pair: Pair) -> tuple[Tensor, Tensor | None]:
    """Weight and bias after the edit; a missing bias is made where the plan names one or the shift needs it.

    `pair` is the map as float64 vectors of length out (`scale_output`) or in (`scale_input`). The
    results keep the weight's type, device and memory format.
    """
    scale, shift = (part.to(weight.device) for part in pair)
    side = "output" if edit.kind == "scale_output" else "input"
    factors = rows(edit.layout, weight, edit.groups, scale, side)
    new_weight = _scaled(weight, factors)
    shifted = bool(shift.count_nonzero())
    if bias is None and not shifted and not edit.bias:
        return new_weight, None
    old = torch.zeros((), dtype=torch.float64, device=weight.device) if bias is None else bias.double()
    if side == "output":
        new_bias = scale * old + shift
    elif shifted or bias is None:
        new_bias = old + bias_from_input_shift(edit.layout, weight, edit.groups, shift)
    else:
        return new_weight, bias
    return new_weight, new_bias.to(weight.dtype if bias is None else bias.dtype)


def edited_norm(
    edit: Edit,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    pair: Pair,
) -> tuple[Tensor, Tensor]:
    """γ and β of a BatchNorm that stays and takes a map in, made where it had none; its statistics stay.

    Output side: γ' = s·γ, β' = s·β + t. Input side, with S = γ/√(σ²+ε): γ' = γ·s and
    β' = β + S·(t − μ + s·μ), so that BN'(x) = BN(s·x + t).
    """
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    scale, shift = (part.to(gamma.device) for part in pair)
    if edit.kind == "scale_output":
        new_gamma, new_beta = scale * gamma.double(), scale * beta.double() + shift
    else:
        own = gamma.double() * (variance.double() + eps).rsqrt()
        new_gamma = gamma.double() * scale
        new_beta = beta.double() + own * (shift - mean.double() + scale * mean.double())
    return new_gamma.to(gamma.dtype), new_beta.to(beta.dtype)


def _scaled(weight: Tensor, factors: Tensor) -> Tensor:
    """The product weight · factors in float64, cast once; a large weight in chunks along the first axis.

    One float64 buffer serves all chunks: three times as fast as a new one for each.
    """
    if weight.numel() <= _CHUNK:
        return (weight * factors).to(weight.dtype)
    out = torch.empty_like(weight)
    step = min(weight.shape[0], max(1, _CHUNK * weight.shape[0] // max(weight.numel(), 1)))
    per_row = factors.shape[0] == weight.shape[0]
    buffer = torch.empty((step, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[0], step):
        rows_ = slice(start, start + step)
        part = buffer[: min(step, weight.shape[0] - start)]
        part.copy_(weight[rows_]).mul_(factors[rows_] if per_row else factors)
        out[rows_].copy_(part)
    return out
