"""The surgeries by their steps, which the public functions and the command line share.

A model is observed once; an insertion or a fold on it gives a `SurgeryResult`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from bntool.batches import inputs_of
from bntool.checking import check_surgery, seeded_batches
from bntool.errors import CheckFailed, UsageError
from bntool.inputs import Inputs
from bntool.inserting import InsertOptions
from bntool.insertion import check_unchanged, insert_observed
from bntool.module_folding import plan_module_fold
from bntool.observe.eager import Observation, observe
from bntool.observe.inference import observe_inferred
from bntool.plan import Plan
from bntool.proving import proved_fold
from bntool.reference import Reference
from bntool.report.counting import parameter_delta
from bntool.results import SurgeryResult
from bntool.statistics import measure, set_preserving
from bntool.surgery.fold_modules import with_own_tensors
from bntool.sweeping import difference_in_training
from bntool.verdicts import Check


def observed(model: nn.Module, example_inputs: Any, *, small: bool = False) -> Observation:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}, not an nn.Module",
            next_step="load a file with bntool.load(path).model",
        )
    if example_inputs is None:
        return observe_inferred(model, small=small)
    return observe(model, Inputs.of(example_inputs))


def insert_with(model: nn.Module, observation: Observation, options: InsertOptions) -> SurgeryResult:
    """`insert` on a model already observed; the result shares its untouched tensors with `model`.

    Raises `CheckFailed` where a bias moved and the eval output is not the same within rounding.
    """
    plan, modified, check = insert_observed(model, observation, options)
    result = as_result(model, modified, plan, observation.inputs, (check,) if check else ())
    if plan.dropped and (options.init == "identity" or not plan.sites):
        return with_checks(result, check_insert(model, result.model, plan, observation.inputs))
    return result


def check_insert(
    model: nn.Module, modified: nn.Module, plan: Plan, inputs: Inputs, *, full: bool = False
) -> list[Check]:
    """The insertion held to what it promises: to the last bit, or within rounding where numbers moved.

    Raises `CheckFailed` where it is not so.
    """
    if plan.options.get("init") == "identity" and not plan.dropped:
        rows = [check_unchanged(model, modified, inputs, full=full)]
    else:
        batches = seeded_batches(inputs) if full else [inputs]
        rows = check_surgery(model, modified, batches, stage="insert")
    if not all(row.passed for row in rows):
        raise CheckFailed("the insertion changes the output", next_step="please report this model")
    return rows


def measured_insert(model: nn.Module, result: SurgeryResult, batches: Iterable[Any]) -> SurgeryResult:
    """Give the BatchNorms just inserted the statistics of what they read, and the affine that undoes them.

    Eval outputs stay within rounding, which is checked; the first training step stays close, since each
    BatchNorm then normalises by what it undoes. A site that the data does not reach stays an identity.
    Raises `CheckFailed` where the eval output is not the same within rounding.
    """
    names = [name for site in result.plan.insert_sites for name in site.norms]
    first: list[Inputs] = []
    found = measure(result.model, names, _first_kept(inputs_of(model, batches), first))
    for name, (mean, variance) in found.items():
        set_preserving(result.model.get_submodule(name), mean, variance)
    eps = float(result.plan.options["eps"])
    dead = {name: (variance < eps).nonzero().flatten().tolist() for name, (_, variance) in found.items()}
    notes = [
        f"{name}: {len(channels)} of {len(found[name][1])} channels hardly vary (σ² < ε): {_listed(channels)}"
        for name, channels in dead.items()
        if channels
    ]
    notes += [f"{name}: not reached by the data, left an identity" for name in names if name not in found]
    moved = difference_in_training(model, result.model, names, first)
    if moved is not None:
        notes.append(
            "first training step: where the new layers normalise by the batch, the output of the first one "
            f"moves by {moved:.1e} of its peak"
        )
    checks = result.checks
    if result.inputs is not None:
        checks = tuple(check_insert(model, result.model, result.plan, result.inputs))
    plan = dataclasses.replace(result.plan, notes=(*result.plan.notes, *notes))
    return dataclasses.replace(result, plan=plan, checks=checks)


def _listed(channels: Sequence[int], most: int = 16) -> str:
    more = f" and {len(channels) - most} more" if len(channels) > most else ""
    return ", ".join(map(str, channels[:most])) + more


def _first_kept(batches: Iterable[Inputs], first: list[Inputs]) -> Iterator[Inputs]:
    for batch in batches:
        if not first:
            first.append(batch)
        yield batch


def fold_observed(
    model: nn.Module,
    observation: Observation,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> SurgeryResult:
    """`fold` on a model already observed, unchecked; the result shares its untouched tensors with `model`."""
    planned = plan_module_fold(
        model, observation, include=include, exclude=exclude, merge=merge, thorough=False, unshare=unshare
    )
    return as_result(model, planned.carry_out(), planned.plan, observation.inputs)


def fold_proved(
    model: nn.Module, observation: Observation, reference: Reference, **options: Any
) -> SurgeryResult:
    """`fold` on a model already observed, proved against `reference` and on inputs of other sizes."""
    proved = proved_fold(model, observation, reference, **options)
    result = as_result(model, proved.model, proved.plan, observation.inputs)
    return with_checks(result, proved.checks)


def unchanged(model: nn.Module) -> SurgeryResult:
    """The result of doing nothing, for what only exports and checks."""
    return as_result(model, model, Plan("fold", (), ()), None)


def as_result(
    before: nn.Module, after: nn.Module, plan: Plan, inputs: Inputs | None, checks: tuple[Check, ...] = ()
) -> SurgeryResult:
    return SurgeryResult(after, plan, parameter_delta(before, after), checks, inputs)


def with_checks(result: SurgeryResult, checks: Sequence[Check]) -> SurgeryResult:
    return dataclasses.replace(result, checks=tuple(checks))


def on_its_own(result: SurgeryResult, original: nn.Module) -> SurgeryResult:
    """The result with a model that shares no tensor with the original."""
    return dataclasses.replace(result, model=with_own_tensors(result.model, original))
