"""Comparison arithmetic: how far outputs lie apart, and how far they may, given the model's own rounding.

Everything is computed in float64. Distances are relative to the peak |reference| of each output, because
element by element a relative error says nothing near zero. The limit is the **noise floor**: the error e0
that the original itself makes in its own precision, measured against its own float64 run.

    limit = K_NOISE * e0 + eps * sqrt(layers)

K_NOISE = 8. A fold re-associates one rounding per layer, and ONNX Runtime sums in another order: both are
new draws of the same noise, measured at 1 to 2.2 times e0 on torchvision models. The two are maxima over
few draws, so their ratio scatters; 8 leaves that room, and TF32 left on (2000 times e0) stays far outside.

The second term holds where e0 is small by luck (exact weights, one layer). A layer rounds once when its
tensor is stored and once when its result is: each relative error is at most u = eps/2. Over `layers` layers
independent errors add like a random walk, u * sqrt(layers); the folded weight adds as much again for its
own cast, so the two together stay within 2 * u * sqrt(layers) = eps * sqrt(layers).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bntool.core.errors import CheckFailed, StateError
from bntool.core.verdicts import Check
from bntool.verifying.differences import Difference, difference, in_float64, peak_of, rounds

K_NOISE = 8.0
Outputs = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one output may differ by, relative to its peak; `undecidable` says why no limit can decide it.

    `absolute` comes on top, whatever the peak: what the runtime's own Sigmoid or Softmax errs by.
    """

    noise_floor: float
    limit: float
    undecidable: str = ""
    absolute: float = 0.0


def rounding_term(eps: float, layers: int) -> float:
    """The second term of the limit, eps * sqrt(layers), derived at the head of this file."""
    return eps * math.sqrt(max(layers, 1))


def compare(
    reference: Sequence[Outputs],
    candidate: Sequence[Outputs],
    limits: Mapping[str, Limit],
    *,
    stage: str,
    device: str,
    provider: str,
    detail: str = "",
    atol: float | None = None,
    rtol: float | None = None,
) -> Check:
    """One verdict over every output of every batch.

    `atol` or `rtol` replace the noise floor: no element may lie further off than atol + rtol · peak, the
    largest absolute value of its output in the reference. An output out of a limit that cannot decide it
    fails, and the detail says why. Raises `CheckFailed` when there is nothing to compare, and `StateError`
    when the reference holds no finite value: never a pass.
    """
    if not reference or len(reference) != len(candidate):
        raise _nothing(f"{len(candidate)} result(s) for {len(reference)} batch(es)")
    if not any(t.numel() for outputs in reference for t in outputs.values()):
        raise _nothing("every output is empty")
    if not any(t.isfinite().any() for outputs in reference for t in outputs.values()):
        raise StateError(
            "the model's own output is NaN or infinite everywhere, so nothing can be compared",
            next_step="look for NaN in its weights, or pass other inputs with --input",
        )
    rows: list[tuple[float, str, Limit, Difference]] = []
    remarks = [detail] if detail else []
    nothing = {**constant_outputs(reference, limits), **silent_outputs(reference)}
    remarks += [f"{name}: {why}, which proves nothing" for name, why in nothing.items()]
    differs, unsure, shown = False, False, False
    for expected, got in zip(reference, candidate, strict=True):
        extra = [name for name in got if name not in expected]
        remarks += [f"{name}: an output that the reference does not have" for name in extra]
        differs |= bool(extra)
        for name, tensor in expected.items():
            limit, diff = limits[name], difference(tensor, got.get(name))
            if atol is not None or rtol is not None:
                limit, diff = _by_tolerance(tensor, limit, diff, atol or 0.0, rtol or 0.0)
                remarks += [f"{name}: allowed all of its peak and more, which proves nothing"] * (
                    limit.limit >= 1
                )
            elif limit.absolute:
                limit, diff, weak = _with_absolute(tensor, limit, diff)
                nothing |= {name: weak} if weak else {}
                remarks += [
                    f"{name}: undecided: {weak}; pass inputs that it answers to with --inputs"
                ] * bool(weak)
            within = math.isfinite(diff.max_abs) and diff.relative <= limit.limit
            differs |= not within and not limit.undecidable
            unsure |= not within and bool(limit.undecidable)
            shown |= within and tensor.numel() > 0 and name not in nothing
            if diff.problem:
                remarks.append(f"{name}: {diff.problem}")
            if not within and limit.undecidable:
                nothing[name] = limit.undecidable
                remarks.append(f"{name}: {limit.undecidable}, so nothing is proved")
            rows.append((_severity(diff, limit), name, limit, diff))
    _, name, limit, diff = max(rows, key=lambda row: row[0])
    scores = [row[3].top1 for row in rows if row[3].top1 is not None]
    return Check(
        stage=stage,
        device=device,
        provider=provider,
        passed=shown and not differs and not unsure,
        max_abs=max(row[3].max_abs for row in rows),
        relative=diff.relative,
        rms=diff.rms,
        cosine=min(row[3].cosine for row in rows),
        top1=min(scores) if scores else None,
        noise_floor=limit.noise_floor,
        ratio=diff.relative / limit.noise_floor if limit.noise_floor else diff.relative,
        limit=limit.limit,
        batches=len(reference),
        detail="; ".join(dict.fromkeys(remarks)),
        worst=(name, diff.index),
        tolerance=", ".join(f"{k} {v:g}" for k, v in (("atol", atol), ("rtol", rtol)) if v is not None),
        undecided=""
        if differs or (shown and not unsure)
        else "; ".join(f"{n}: {w}" for n, w in nothing.items()),
    )


def noise_limits(
    reference: Sequence[Outputs], own: Sequence[Outputs], layers: int, eps: float
) -> dict[str, Limit]:
    """The limit of every output, from the original's float64 runs and its runs in its own precision.

    The noise of one output is the largest over the batches. An output whose shape, finiteness or first
    half of digits (relative error above sqrt(eps)) depends on the model's own rounding is undecidable.
    """
    limits: dict[str, Limit] = {}
    for name in dict.fromkeys(name for outputs in reference for name in outputs):
        pairs = [(ref[name], mine.get(name)) for ref, mine in zip(reference, own, strict=True) if name in ref]
        found = [difference(ref, mine) for ref, mine in pairs]
        floating = rounds(pairs[0][0])
        why = ""
        if any(mine is None or mine.shape != ref.shape for ref, mine in pairs):
            why = "the model's own rounding changes this output's shape"
        elif any(not math.isfinite(d.relative) for d in found) and floating:
            why = "the model's own precision does not hold this output"
        noise = max((d.relative for d in found if math.isfinite(d.relative)), default=0.0)
        if not floating:
            # No rounding to allow for: an integer that differs is a decision that fell the other way.
            why = why or (f"the model's own rounding changes {noise:.0%} of these integers" if noise else "")
            limits[name] = Limit(noise, min(K_NOISE * noise, 0.5), why)
            continue
        if noise > math.sqrt(eps):
            why = why or f"the model's own rounding moves this output by {noise:.2g} of its peak"
        noise = min(max(noise, eps / 2), math.sqrt(eps))
        limits[name] = Limit(noise, K_NOISE * noise + rounding_term(eps, layers), why)
    return limits


def _severity(diff: Difference, limit: Limit) -> float:
    return diff.relative / limit.limit if limit.limit else (math.inf if diff.relative else 0.0)


def _by_tolerance(
    reference: Tensor, limit: Limit, diff: Difference, atol: float, rtol: float
) -> tuple[Limit, Difference]:
    """The limit that tolerances set, and the difference on its scale: the peak, or 1 where that is zero.

    Of integers `relative` is otherwise the share of them that differ, which no tolerance is about.
    """
    peak = peak_of(in_float64(reference))
    scale = peak or 1.0
    allowed = atol / scale + (rtol if peak else 0.0)
    return (
        dataclasses.replace(limit, limit=allowed, undecidable=""),
        dataclasses.replace(diff, relative=diff.max_abs / scale),
    )


def _with_absolute(reference: Tensor, limit: Limit, diff: Difference) -> tuple[Limit, Difference, str]:
    """The limit with its absolute part, on the scale of the peak, or of 1 where that is zero; and what to say
    where that part leaves less than half of the digits to decide by.
    """
    peak = peak_of(in_float64(reference))
    scale = peak or 1.0
    allowed = limit.limit * (peak / scale) + limit.absolute / scale
    remark = ""
    if limit.absolute > math.sqrt(torch.finfo(torch.float32).eps) * peak:
        remark = f"its peak of {peak:.2g} is near what the runtime itself errs by, {limit.absolute:.1g}"
    relative = diff.max_abs / scale
    return dataclasses.replace(limit, limit=allowed), dataclasses.replace(diff, relative=relative), remark


def silent_outputs(reference: Sequence[Outputs]) -> dict[str, str]:
    """The outputs that are one number everywhere, on all inputs, and so tell no two models apart; and why."""
    silent = {}
    for name in reference[0]:
        values = [outputs[name].flatten() for outputs in reference if name in outputs]
        found = torch.cat(values).double() if all(not v.is_complex() for v in values) else torch.empty(0)
        if found.numel() > 1 and bool((found == found[0]).all()):
            silent[name] = "one number everywhere"
    return silent


def constant_outputs(reference: Sequence[Outputs], limits: Mapping[str, Limit]) -> dict[str, str]:
    """The outputs that are the same for every sample, but for the model's own rounding; and why they tell
    nothing. An output whose samples cannot be told (no leading axis, one sample in all) is none of them.
    """
    constant = {}
    for name in reference[0]:
        values = [in_float64(outputs[name]) for outputs in reference if name in outputs]
        if any(not v.dim() or v.shape[1:] != values[0].shape[1:] or not v.numel() for v in values):
            continue
        samples = torch.cat(values)
        if len(samples) < 2 or not bool(samples.isfinite().all()):
            continue
        spread = float((samples.amax(0) - samples.amin(0)).max())
        noise = limits[name].noise_floor if rounds(reference[0][name]) else 0.0  # of integers it is a share
        if spread <= noise * peak_of(samples):
            constant[name] = "the same for every sample"
    return constant


def _nothing(why: str) -> CheckFailed:
    return CheckFailed(
        f"there is nothing to compare: {why}",
        next_step="pass inputs on which the model returns something, with --input or --inputs",
    )
