"""Prove the fold of a module by running it: in float64, on inputs of sizes that the plan has not seen."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from bntool.checking import check_surgery
from bntool.errors import BntoolError, CheckFailed
from bntool.inputs import Inputs
from bntool.module_folding import PlannedFold, other_sizes, plan_module_fold
from bntool.observe.eager import Observation
from bntool.observe.inference import has_fixed_size
from bntool.plan import Plan
from bntool.reference import Progress, Reference
from bntool.settling import first_at_fault, settle
from bntool.surgery.fold_modules import apply_fold
from bntool.verdicts import Check


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
    elsewhere: list[Reference | None] = []

    def ground() -> Reference | None:
        """The original on other sizes, which runs only once there is something to prove."""
        if not elsewhere:
            elsewhere.append(reference_elsewhere(model, observation.inputs))
        return elsewhere[0]

    planned: list[PlannedFold] = []

    def plan_without(names: Sequence[str], merges: bool) -> Plan:
        planned[:] = [
            plan_module_fold(
                model, observation, include=include, exclude=names, merge=merges, unshare=unshare
            )
        ]
        return planned[0].plan

    def carry_out(plan: Plan) -> tuple[nn.Module, tuple[Check, ...]]:
        folded = planned[0].carry_out()
        if not plan:
            return folded, ()
        return folded, tuple(
            check_fold(
                model,
                folded,
                plan,
                reference,
                ground(),
                device=device,
                progress=progress,
                atol=atol,
                rtol=rtol,
            )
        )

    def agrees(part: Plan) -> bool:
        return _agrees(model, part, ground() or reference)

    plan, (folded, checks) = settle(plan_without, carry_out, agrees, exclude, merge)
    return Proved(plan, folded, checks)


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
        changed_parts=_changed_parts(model, plan),
        atol=atol,
        rtol=rtol,
    )
    if not all(check.passed for check in checks):
        raise CheckFailed(
            f"the folded model differs from the original: {_worst(checks)}",
            where=first_at_fault(plan, lambda part: _agrees(model, part, elsewhere or reference)),
            next_step="leave that BatchNorm out with --exclude, and please report it",
        )
    return checks


def reference_elsewhere(model: nn.Module, inputs: Inputs) -> Reference | None:
    """The original on an input of other sizes and one sample more; None where it takes no such input."""
    for other in other_sizes(inputs, fixed=has_fixed_size(model)):
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


def _agrees(model: nn.Module, part: Plan, reference: Reference) -> bool:
    """Whether a part of a fold stands up on the inputs of a reference."""
    rows = check_surgery(
        model,
        apply_fold(model, part).eval(),
        reference.inputs,
        stage="fold",
        candidate64=in_float64(model, lambda wide: apply_fold(wide, part)),
        reference=reference,
        changed_parts=_changed_parts(model, part),
    )
    return all(row.passed for row in rows)


def _changed_parts(model: nn.Module, plan: Plan) -> set[str]:
    """The children of the model whose output a fold may change: all that no fold is wholly inside of."""
    whole: set[str] = set()
    crossed: set[str] = set()
    for site in plan.fold_sites:
        homes = {name.partition(".")[0] for name in (site.bn, *site.into)}
        (whole if len(homes) == 1 else crossed).update(homes)
    return {name for name, _ in model.named_children()} - (whole - crossed)


def _worst(checks: Sequence[Check]) -> str:
    failed = next(check for check in checks if not check.passed)
    why = failed.detail or failed.stage
    return f"{failed.figures} ({why})"
