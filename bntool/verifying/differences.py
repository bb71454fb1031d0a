"""How far one tensor lies from another, computed in float64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one candidate tensor lies from its reference. `problem` names what cannot be a number."""

    max_abs: float = 0.0
    relative: float = 0.0
    rms: float = 0.0
    cosine: float = 1.0
    top1: float | None = None
    index: tuple[int, ...] = ()
    problem: str = ""


def difference(reference: Tensor, candidate: Tensor | None) -> Difference:
    """How far `candidate` lies from `reference`, both of one shape.

    NaN, and infinity of one sign, agree only with themselves: anything else is a problem, never a number.
    """
    if candidate is None:
        return _broken("the output is missing")
    if reference.shape != candidate.shape:
        return _broken(f"the shape is {list(candidate.shape)}, expected {list(reference.shape)}")
    if reference.is_complex() != candidate.is_complex():
        return _broken("one of the two is complex")
    ref, cand = in_float64(reference), in_float64(candidate)
    same = (ref == cand) | (ref.isnan() & cand.isnan())
    odd = ~(ref.isfinite() & cand.isfinite())
    wrong = odd & ~same
    if wrong.any():
        at = _unravel(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape)
        values = f"{float(cand[at])} where the reference has {float(ref[at]):.6g}"
        return dataclasses.replace(_broken(f"{int(wrong.sum())} value(s) wrong, first {values}"), index=at)
    ref, cand = ref.masked_fill(odd, 0.0), cand.masked_fill(odd, 0.0)
    if ref.numel() == 0:
        return Difference()
    delta = (cand - ref).abs()
    at = _unravel(int(delta.flatten().argmax()), delta.shape)
    max_abs, peak = float(delta.max()), peak_of(ref)
    if not rounds(reference):
        # Integers carry no rounding: what counts is how many of them differ.
        relative = float((delta != 0).double().mean())
    else:
        relative = 0.0 if max_abs == 0 else (max_abs / peak if peak else math.inf)
    return Difference(
        max_abs=max_abs,
        relative=relative,
        rms=float(delta.square().mean().sqrt()),
        cosine=_cosine(ref, cand),
        top1=_top1(ref, cand) if reference.is_floating_point() else None,
        index=at,
        problem=f"{int(odd.sum())} value(s) not finite in both" if odd.any() else "",
    )


def rounds(tensor: Tensor) -> bool:
    """Whether numbers of this type carry rounding."""
    return tensor.is_floating_point() or tensor.is_complex()


def peak_of(exact: Tensor) -> float:
    """The largest finite |value|; zero where there is none."""
    return float(exact.masked_fill(~exact.isfinite(), 0.0).abs().max()) if exact.numel() else 0.0


def _broken(problem: str) -> Difference:
    return Difference(math.inf, math.inf, math.inf, 0.0, problem=problem)


def in_float64(tensor: Tensor) -> Tensor:
    """On the CPU, in float64, a complex number as two."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to("cpu", torch.float64)


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    if norms == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float((a * b).sum()) / norms


def _top1(reference: Tensor, candidate: Tensor) -> float | None:
    if reference.dim() != 2 or reference.shape[1] < 2:
        return None
    return float((reference.argmax(1) == candidate.argmax(1)).double().mean())


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    at: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        at.append(rest)
    return tuple(reversed(at))
