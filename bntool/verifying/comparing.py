"""Comparison arithmetic: how far outputs lie apart, relative to the peak of each, and one verdict over them.

Everything is computed in float64. How far they may lie apart is told in `core/tolerances`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bntool.core.errors import CheckFailed, StateError
from bntool.core.tolerances import (
    BY_NOISE,
    HALF,
    K_NOISE,
    Limit,
    Tolerance,
    half_the_digits,
    measured,
)
from bntool.core.verdicts import Check
from bntool.verifying.differences import Difference, difference, in_float64, peak_of, rounds

Outputs = Mapping[str, Tensor]


def compare(
    reference: Sequence[Outputs],
    candidate: Sequence[Outputs],
    limits: Mapping[str, Limit],
    *,
    stage: str,
    device: str,
    provider: str,
    detail: str = "",
    tolerance: Tolerance = BY_NOISE,
) -> Check:
    """One verdict over every output of every batch.

    A `tolerance` that is asked replaces the noise-floor limit: no element of an output may then lie further
    off than atol + rtol · peak |reference| of that output. An output out of a limit that cannot decide it
    fails, and the detail says why. Raises `CheckFailed` when there is nothing to compare, and `StateError`
    when the reference holds no finite value: never a pass.
    """
    _require_something(reference, candidate)
    judged = _Judged(limits, tolerance, {**constant_outputs(reference, limits), **silent_outputs(reference)})
    remarks = [detail] if detail else []
    remarks += [f"{name}: {why}, which proves nothing" for name, why in judged.nothing.items()]
    for expected, got in zip(reference, candidate, strict=True):
        remarks += judged.batch(expected, got)
    worst = max(judged.rows, key=lambda row: _severity(row.diff, row.limit))
    scores = [row.diff.top1 for row in judged.rows if row.diff.top1 is not None]
    floor, diff = worst.limit.noise_floor, worst.diff
    return Check(
        stage=stage,
        device=device,
        provider=provider,
        passed=judged.passed,
        max_abs=max(row.diff.max_abs for row in judged.rows),
        relative=diff.relative,
        rms=diff.rms,
        cosine=min(row.diff.cosine for row in judged.rows),
        top1=min(scores) if scores else None,
        noise_floor=floor,
        ratio=diff.relative / floor if floor else diff.relative,
        limit=worst.limit.limit,
        batches=len(reference),
        detail="; ".join(dict.fromkeys(remarks)),
        worst=(worst.name, diff.index),
        tolerance=str(tolerance),
        undecided=judged.undecided,
    )


def _require_something(reference: Sequence[Outputs], candidate: Sequence[Outputs]) -> None:
    if not reference or len(reference) != len(candidate):
        raise _nothing(f"{len(candidate)} result(s) for {len(reference)} batch(es)")
    if not any(t.numel() for outputs in reference for t in outputs.values()):
        raise _nothing("every output is empty")
    if not any(t.isfinite().any() for outputs in reference for t in outputs.values()):
        raise StateError(
            "the model's own output is NaN or infinite everywhere, so nothing can be compared",
            next_step="look for NaN in its weights, or pass other inputs with --input",
        )


@dataclasses.dataclass(frozen=True)
class _Row:
    """One output of one batch."""

    name: str
    limit: Limit
    diff: Difference


class _Judged:
    """The outputs judged so far; `nothing` are those that prove nothing, and why."""

    def __init__(self, limits: Mapping[str, Limit], tolerance: Tolerance, nothing: dict[str, str]) -> None:
        self._limits, self._tolerance, self.nothing = limits, tolerance, nothing
        self.rows: list[_Row] = []
        self._differs, self._unsure, self._shown = False, False, False

    @property
    def passed(self) -> bool:
        return self._shown and not self._differs and not self._unsure

    @property
    def undecided(self) -> str:
        if self._differs or (self._shown and not self._unsure):
            return ""
        return "; ".join(f"{name}: {why}" for name, why in self.nothing.items())

    def batch(self, expected: Outputs, got: Outputs) -> Iterator[str]:
        """Judge every output of one batch; what is to be said of them."""
        extra = [name for name in got if name not in expected]
        yield from (f"{name}: an output that the reference does not have" for name in extra)
        self._differs |= bool(extra)
        for name, tensor in expected.items():
            limit, diff = self._limits[name], difference(tensor, got.get(name))
            if self._tolerance.is_asked:
                limit, diff = _by_tolerance(tensor, limit, diff, self._tolerance)
            elif limit.absolute:
                limit, diff, weak = _with_absolute(tensor, limit, diff)
                if weak:
                    self.nothing[name] = weak
                    yield f"{name}: undecided: {weak}; pass inputs that it answers to with --inputs"
            yield from self._output(_Row(name, limit, diff), counts=tensor.numel() > 0)

    def _output(self, row: _Row, *, counts: bool) -> Iterator[str]:
        name, limit, diff = row.name, row.limit, row.diff
        within = math.isfinite(diff.max_abs) and diff.relative <= limit.limit
        self._differs |= not within and not limit.undecidable
        self._unsure |= not within and bool(limit.undecidable)
        self._shown |= within and counts and name not in self.nothing
        self.rows.append(row)
        if diff.problem:
            yield f"{name}: {diff.problem}"
        if not within and limit.undecidable:
            self.nothing[name] = limit.undecidable
            yield f"{name}: {limit.undecidable}, so nothing is proved"


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
            limits[name] = Limit(noise, min(K_NOISE * noise, HALF), why)
            continue
        if noise > half_the_digits(eps):
            why = why or f"the model's own rounding moves this output by {noise:.2g} of its peak"
        noise = min(max(noise, eps / 2), half_the_digits(eps))
        limits[name] = measured(noise, eps, layers, why)
    return limits


def _severity(diff: Difference, limit: Limit) -> float:
    return diff.relative / limit.limit if limit.limit else (math.inf if diff.relative else 0.0)


def _by_tolerance(
    reference: Tensor, limit: Limit, diff: Difference, tolerance: Tolerance
) -> tuple[Limit, Difference]:
    """The limit that a tolerance sets, and the difference on its scale: the peak, or 1 where that is zero.

    Of integers `relative` is otherwise the share of them that differ, which no tolerance is about.
    """
    peak = peak_of(in_float64(reference))
    scale = peak or 1.0
    allowed = (tolerance.atol or 0.0) / scale + ((tolerance.rtol or 0.0) if peak else 0.0)
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
    if limit.absolute > half_the_digits(torch.finfo(torch.float32).eps) * peak:
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
