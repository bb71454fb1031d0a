"""One fold and one insertion, for every kind of model: plan, apply, prove, and keep what stands up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bntool.calibrating.drift import POOLED
from bntool.calibrating.statistics import of_population, set_preserving, swept
from bntool.calibrating.sweeping import difference_in_training
from bntool.core.errors import CheckFailed, DamagedPlan
from bntool.core.options import FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.schema import Damaged
from bntool.core.tolerances import Limit
from bntool.core.verdicts import Check, first_apart
from bntool.data.loaders import inputs_of
from bntool.graph.inputs import Inputs
from bntool.pipeline.bisecting import first_at_fault, settle
from bntool.results.results import SurgeryResult
from bntool.subjects.base import Checking, Proof, S, Subject
from bntool.subjects.module import ModuleSubject


def fold(
    subject: S,
    options: FoldOptions,
    proof: Proof[S] | None = None,
    *,
    worth: Callable[[Plan], bool] = bool,
) -> tuple[SurgeryResult, S]:
    """Fold every BatchNorm that algebra allows; with a `proof`, only what stands up to it.

    What does not stand up is not folded (reason `not-proved`). A plan that is not `worth` it is not carried
    out. A first plan looks at one observation; another, of other sizes, is made where no proof looks there,
    or where the proof fails. The result's model shares what stays with the original.

    Raises:
        CheckFailed: the folded model does not compute the same, and no BatchNorm is at fault.
    """
    thorough = [False]

    def plan_without(names: Sequence[str], merges: bool) -> Plan:
        chosen = dataclasses.replace(options, exclude=tuple(names), merge=merges)
        return subject.plan_fold(chosen, thorough=thorough[0])

    def carry_out(plan: Plan) -> tuple[S, tuple[Check, ...]]:
        if not worth(plan):
            return subject, ()
        if proof is not None and plan and not thorough[0] and not proof.looks_elsewhere:
            raise CheckFailed("one observation alone says nothing of other sizes")
        after = subject.folded(plan)
        rows = tuple(proof.rows(plan, after)) if proof is not None and plan else ()
        failed = first_apart(rows)
        if failed is not None:
            raise _not_borne_out(failed, proof)
        return after, rows

    def look_again() -> bool:
        """Whether another plan is to be had, from inputs of other sizes."""
        again, thorough[0] = not thorough[0], True
        return again

    def agrees(part: Plan) -> bool:
        return proof is not None and proof.agrees(part)

    plan, (after, rows) = settle(
        plan_without, carry_out, agrees, options.exclude, options.merge, look_again=look_again
    )
    plan = subject.told(plan)
    return _result(subject, after, plan, rows), after


def insert(subject: S, options: InsertOptions, checking: Checking | None = None) -> tuple[SurgeryResult, S]:
    """Insert BatchNorm between convolutions and their activations; with `checking`, held to what it promises.

    That is the eval output to the last bit, or within rounding where numbers moved; with `init="default"`
    nothing. The result's model shares what stays with the original.

    Raises `CheckFailed` where it is not so.
    """
    options.validate()
    plan, after = subject.inserted(options)
    keeps = options.init == "identity" or not plan.sites
    rows = subject.insert_rows(plan, after, checking) if checking is not None and plan and keeps else []
    return _result(subject, after, plan, tuple(rows)), after


def apply(subject: S, plan: Plan, checking: Checking | None = None) -> tuple[SurgeryResult, S]:
    """Carry out a plan from elsewhere; with `checking`, it is checked like a new one where the model runs.

    Raises:
        DamagedPlan: the plan is none, or names what the model has not; where in it is told.
        PlanError: the plan was made for another model; the first difference is named.
        CheckFailed: the plan does not hold on this model.
    """
    checking = checking if subject.runs else None
    try:
        plan, after = subject.replayed(plan, checked=checking is not None)
        if checking is not None:
            subject = subject.prepared(FoldOptions(bake=bool(plan.options.get("bake"))))
        rows = _replayed_rows(subject, plan, after, checking)
    except Damaged as error:
        raise DamagedPlan.of(error.why, error.place) from error
    return _result(subject, after, plan, tuple(rows)), after


def _replayed_rows(subject: S, plan: Plan, after: S, checking: Checking | None) -> list[Check]:
    rows: list[Check] = []
    if checking is not None and plan and plan.action == "fold":
        proof = subject.proof(checking)
        rows = proof.rows(plan, after)
        failed = first_apart(rows)
        if failed is not None:
            error = _not_borne_out(failed, proof)
            error.where = first_at_fault(plan, proof.agrees) or error.where
            raise error
    elif checking is not None and plan and plan.options.get("init") != "default":
        rows = subject.insert_rows(plan, after, checking)
    return rows


def measured_insert(subject: Subject, result: SurgeryResult, batches: Iterable[Any]) -> SurgeryResult:
    """Give the BatchNorms just inserted the statistics of what they read, and the affine that undoes them.

    Eval outputs stay within rounding, which is checked; the first training step stays close, since each
    BatchNorm then normalises by what it undoes. A site that the data does not reach stays an identity.
    Raises `CheckFailed` where the eval output is not the same within rounding.
    """
    model = subject.model
    names = [name for site in result.plan.insert_sites for name in site.norms]
    first: list[Inputs] = []
    seen = swept(result.model, names, _first_kept(inputs_of(model, batches), first))
    found = of_population(seen)
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
    notes += [warning for warning in [seen.grouping.told(seen.first, POOLED)] if warning]
    rows = subject.insert_rows(result.plan, ModuleSubject(result.model), Checking())
    plan = dataclasses.replace(result.plan, notes=(*result.plan.notes, *notes))
    return dataclasses.replace(result, plan=plan, checks=tuple(rows))


def unchanged(subject: S) -> SurgeryResult:
    """The result of doing nothing, for what only exports and checks."""
    return _result(subject, subject, Plan("fold", (), ()), ())


def _result(subject: S, after: S, plan: Plan, rows: tuple[Check, ...]) -> SurgeryResult:
    return SurgeryResult(after.model, plan, subject.parameters(after), rows, kind=subject.kind)


def _not_borne_out(failed: Check, proof: Any) -> CheckFailed:
    limits = getattr(getattr(proof, "reference", None), "redrawn_limits", {})
    limit: Limit | None = limits.get(failed.worst[0]) if failed.precision == "" else None
    where = f"output {failed.worst[0]} on {failed.provider} ({failed.stage} {failed.precision}".rstrip() + ")"
    if limit is not None and limit.undecidable:
        return CheckFailed(
            f"the fold cannot be checked: {limit.undecidable}",
            where=where,
            next_step="give inputs that it answers to with --inputs FILE, or verify what --check none makes",
        )
    why = failed.detail or failed.stage
    return CheckFailed(
        f"the folded model differs from the original: {failed.figures} ({why})",
        where=where,
        next_step="leave that BatchNorm out with --exclude, and please report it",
    )


def _listed(channels: Sequence[int], most: int = 16) -> str:
    more = f" and {len(channels) - most} more" if len(channels) > most else ""
    return ", ".join(map(str, channels[:most])) + more


def _first_kept(batches: Iterable[Inputs], first: list[Inputs]) -> Iterator[Inputs]:
    for batch in batches:
        if not first:
            first.append(batch)
        yield batch
