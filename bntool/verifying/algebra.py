"""The algebra of a surgery: redone in float64, far below any rounding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from bntool.core.errors import BntoolError, CheckFailed
from bntool.core.verdicts import Check
from bntool.runtime.libraries import first_line
from bntool.verifying.comparing import Limit, Outputs, compare
from bntool.verifying.differences import difference
from bntool.verifying.float64 import Unrounded, run_float64
from bntool.verifying.reference import Progress, Reference

# The surgery is algebra: redone in float64 it must agree far below any float32 rounding (6e-8), while the
# float64 noise of deep networks, measured near 1e-15 of the peak, stays far under it.
# A network that carries a rounding further is held to K_NOISE times what it makes of float64's own.
ALGEBRA_LIMIT = 1e-10


def check_algebra(
    reference: Reference,
    candidate64: nn.Module | Unrounded | None,
    stage: str,
    say: Progress,
    changed_parts: Collection[str] = (),
    chosen: slice = slice(None),
) -> Check | None:
    """The row of `candidate64`, a surgery redone in float64, on the `chosen` inputs of a reference.

    None where there is no such candidate, or the original has no float64 run. Raises `CheckFailed` when the
    candidate does not run.
    """
    if candidate64 is None or reference.exact is None:
        return None
    say("checking the algebra in float64")
    row = _judged(reference, candidate64, stage, changed_parts, chosen)
    if not row.agrees and isinstance(candidate64, Unrounded) and candidate64.numbers:
        # the numbers may have gone another way than by the tensors that stand for them
        row = _judged(reference, candidate64.copy(), stage, changed_parts, chosen)
    return dataclasses.replace(row, precision="float64")


def _judged(
    reference: Reference,
    candidate64: nn.Module | Unrounded,
    stage: str,
    changed_parts: Collection[str],
    chosen: slice,
) -> Check:
    changed = changed_parts if reference.parts else ()
    inputs, expected = zip(*reference.algebra[chosen], strict=True)
    exact = without(expected, changed)
    try:
        runs, _ = run_float64(candidate64, inputs, parts=reference.parts)
        outputs = without(runs, changed)
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise does_not_run(stage, error) from error
    noise = torch.finfo(torch.float64).eps / 2
    limits = {name: Limit(noise, ALGEBRA_LIMIT) for names in exact for name in names}
    detail = ""
    if reference.narrowed:
        # Where a model narrows inside, one more digit of input moves the narrow rounding: own noise rules.
        # What rounding decides is then told by the parts that come before the decision.
        noisy = {name: reference.limits[name] for name in limits}
        limits = {name: limit for name, limit in noisy.items() if not limit.undecidable} or noisy
        exact = [{n: t for n, t in one.items() if n in limits} for one in exact]
        outputs = [{n: t for n, t in one.items() if n in limits} for one in outputs]
        detail = "in float64 the model narrows inside, so its own noise is the limit"
    judged = functools.partial(compare, exact, outputs, stage=stage, device="cpu", provider="torch")
    row = judged(limits, detail=detail)
    if not row.agrees and not reference.narrowed and reference.exact_limits:
        row = judged(reference.exact_limits, detail="held to the model's own rounding in float64")
    return row


def left_to_algebra(
    expected: Sequence[Outputs], got: Sequence[Outputs], limits: Mapping[str, Limit]
) -> dict[str, str]:
    """Outputs that are there but out of a limit that the model's own rounding makes meaningless, and why."""
    return {
        name: limit.undecidable
        for name, limit in limits.items()
        if limit.undecidable
        and all(name in outputs for outputs in got)
        and any(
            not difference(ref[name], out[name]).relative <= limit.limit
            for ref, out in zip(expected, got, strict=True)
            if name in ref
        )
    }


def without(runs: Sequence[Outputs], parts: Collection[str]) -> list[Outputs]:
    """The outputs of each run, less what these children of the model returned."""
    return [{n: t for n, t in outputs.items() if n.partition(".")[0] not in parts} for outputs in runs]


def does_not_run(stage: str, error: Exception) -> CheckFailed:
    """What is raised where a candidate fails on inputs that the original takes."""
    return CheckFailed(
        f"the model after {stage} does not run: {type(error).__name__}: {first_line(error)}",
        next_step="report this to bntool; --exclude the layer it names to go on",
    )
