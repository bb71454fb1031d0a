"""Prove a fold by running it: in float64, on inputs of sizes that the plan has not seen.

A fold that does not stand up is not done: the BatchNorm at fault is found by bisection, stays with the reason
`not-proved`, and the rest is folded without it.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
from collections.abc import Callable, Sequence

from torch import nn

from bntool.checking import check_surgery
from bntool.errors import BntoolError, CheckFailed
from bntool.inputs import Inputs
from bntool.module_folding import other_sizes, plan_module_fold
from bntool.observe.eager import Observation
from bntool.plan import Plan, Skip
from bntool.reasons import Reason
from bntool.reference import Progress, Reference
from bntool.surgery.fold_modules import apply_fold
from bntool.verdicts import Check

_MOST_UNPROVED = 32
"""Beyond this many BatchNorms at fault the model, not the fold, is what changes from run to run."""


@dataclasses.dataclass(frozen=True)
class Proved:
    """A fold and its checks: every site of the plan stood up to both references."""

    plan: Plan
    model: nn.Module
    checks: tuple[Check, ...]


def proved_fold(
    model: nn.Module,
    observation: Observation,
    reference: Reference,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> Proved:
    """Plan, apply and check a fold until all that is left of it is proved.

    Raises `CheckFailed` when the float32 rows fail although float64 agrees.
    """
    unproved: dict[str, Skip] = {}
    elsewhere: Reference | None = None
    while True:
        without = (*exclude, *(glob.escape(name) for name in unproved))
        plan = plan_module_fold(
            model, observation, include=include, exclude=without, merge=merge, unshare=unshare
        )
        folded = apply_fold(model, plan).eval()
        if not plan:
            return Proved(_with_skips(plan, unproved, exclude), folded, ())
        elsewhere = elsewhere or reference_elsewhere(model, observation.inputs)
        try:
            checks = check_fold(
                model,
                folded,
                plan,
                reference,
                elsewhere,
                device=device,
                progress=progress,
                atol=atol,
                rtol=rtol,
            )
            return Proved(_with_skips(plan, unproved, exclude), folded, tuple(checks))
        except CheckFailed as failure:
            name = first_at_fault(model, plan, elsewhere or reference)
            if not name or len(unproved) == _MOST_UNPROVED:
                raise
            unproved[name] = Skip(name, Reason.NOT_PROVED, failure.what)


def check_fold(
    model: nn.Module,
    folded: nn.Module,
    plan: Plan,
    reference: Reference,
    elsewhere: Reference | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> list[Check]:
    """Run both models: as they are, and with the fold redone in float64 on inputs of other sizes.

    Raises `CheckFailed` when they do not agree, or the folded model does not run.
    """
    checks = check_surgery(
        model,
        folded,
        reference.inputs,
        stage="fold",
        candidate64=in_float64(model, lambda wide: apply_fold(wide, plan)),
        device=device,
        progress=progress,
        reference=reference,
        elsewhere=elsewhere,
        atol=atol,
        rtol=rtol,
    )
    if not all(check.passed for check in checks):
        raise CheckFailed(
            f"the folded model differs from the original: {_worst(checks)}",
            where=first_at_fault(model, plan, elsewhere or reference),
            next_step="leave that BatchNorm out with --exclude, and please report it",
        )
    return checks


def reference_elsewhere(model: nn.Module, inputs: Inputs) -> Reference | None:
    """The original on an input of other sizes and one sample more; None where it takes no such input."""
    for other in other_sizes(inputs):
        found = Reference(model, [other])
        try:
            if found.exact is not None:
                return found
        except BntoolError:
            continue
        return None
    return None


def in_float64(model: nn.Module, surgery: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
    """`surgery` on a float64 copy of the model; None where the model has no float64 copy."""
    try:
        wide = copy.deepcopy(model).double()
    except Exception:  # noqa: BLE001 - a class may refuse to be copied in its own way
        return None
    return surgery(wide)


def first_at_fault(model: nn.Module, plan: Plan, reference: Reference) -> str:
    """The BatchNorm whose fold first makes the outputs differ, or the model fail; empty where none does.

    Bisection over the sites in their order: it takes a fault that shows with the first sites to show with
    more of them, which is so unless two faults cancel out.
    """
    sites = list(plan.fold_sites)

    def agrees(count: int) -> bool:
        part = dataclasses.replace(plan, sites=tuple(sites[:count]))
        try:
            rows = check_surgery(
                model,
                apply_fold(model, part).eval(),
                reference.inputs,
                stage="fold",
                candidate64=in_float64(model, lambda wide: apply_fold(wide, part)),
                reference=reference,
            )
        except CheckFailed:
            return False
        return all(row.passed for row in rows)

    if agrees(len(sites)):
        return ""
    low, high = 0, len(sites)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if agrees(middle) else (low, middle)
    return sites[high - 1].bn


def _worst(checks: Sequence[Check]) -> str:
    failed = next(check for check in checks if not check.passed)
    why = failed.detail or failed.stage
    return f"relative error {failed.relative:.2g}, allowed {failed.limit:.2g} ({why})"


def _with_skips(plan: Plan, unproved: dict[str, Skip], exclude: Sequence[str]) -> Plan:
    skips = tuple(unproved.get(skip.name, skip) for skip in plan.skips)
    return dataclasses.replace(plan, skips=skips, options={**plan.options, "exclude": list(exclude)})
