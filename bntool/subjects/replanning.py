"""A plan carried out on a graph: made anew there with its own options, and held to be the same.

The names in a graph say nothing of what its nodes compute, so no plan for one is taken at its word.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bntool.core.options import FoldOptions
from bntool.core.plan import Plan
from bntool.core.sites import FoldSite
from bntool.inserting.replaying import differences, options_of

if TYPE_CHECKING:
    from bntool.subjects.base import S


def replanned(subject: S, plan: Plan) -> tuple[Plan, S]:
    """The plan as it comes out for `subject`, and the model with it carried out.

    Raises:
        PlanError: it comes out otherwise; the first difference is named.
        Damaged: the plan holds options that there are not.
    """
    if plan.action == "insert":
        here, after = subject.inserted(options_of(plan))
        found = next(differences(plan, here), None)
        if found is not None:
            raise plan.other_model(subject.name, found)
        return here, after
    here = replanned_fold(subject, plan)
    return here, subject.folded(here) if here else subject


def replanned_fold(subject: S, plan: Plan) -> Plan:
    """The same fold, planned for `subject`: its constants may differ in their digits, and in nothing else."""
    options = FoldOptions(
        include=tuple(plan.options["include"]),
        exclude=tuple(plan.options["exclude"]),
        merge=bool(plan.merges),
        unshare=bool(plan.options.get("unshare")),
    )
    again = subject.plan_fold(options, thorough=True)
    found = {site.bn: site for site in again.fold_sites}
    for site in plan.fold_sites:
        if site.bn not in found:
            raise plan.other_model(subject.name, f"it has no BatchNorm {site.bn!r} that folds")
        if _shape(found[site.bn]) != _shape(site):
            raise plan.other_model(subject.name, f"{site.bn!r} folds into other layers")
    if len(again.merges) != len(plan.merges):
        raise plan.other_model(subject.name, "other branches merge")
    names = {site.bn for site in plan.fold_sites}
    return dataclasses.replace(again, sites=tuple(site for site in again.fold_sites if site.bn in names))


def _shape(site: FoldSite) -> list[tuple[str, str]]:
    return [(edit.kind, edit.layer) for edit in site.edits]
