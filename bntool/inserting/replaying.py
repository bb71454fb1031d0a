"""A plan for another model of the same tensors: is each of its places still one?

Names and shapes alone do not say what reads a layer's output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

from bntool.core.errors import UsageError
from bntool.core.options import InsertOptions
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.schema import Damaged, fitted
from bntool.core.sites import InsertSite
from bntool.graph.dataflow import Graph
from bntool.inserting.places import Form
from bntool.inserting.planner import plan_insert


def require_same_places(graph: Graph, plan: Plan) -> None:
    """Plan the same insertion for this graph: every site and every bias that moves must be found again.

    Raises:
        PlanError: the first that is not, and how it is here.
        Damaged: the plan holds options that there are not.
    """
    found = next(differences(plan, plan_insert(graph, options_of(plan))), None)
    if found is not None:
        raise plan.other_model(graph.model_class, found)


def differences(plan: Plan, here: Plan) -> Iterator[str]:
    """Each site of `plan`, and each bias that moves, which is not the same in a plan made `here`."""
    yield from _sites(plan, here)
    yield from _biases(plan, here)


def options_of(plan: Plan) -> InsertOptions:
    """The plan's own options, with the forms banned that were given up on the way to it.

    Raises:
        Damaged: there is no such option, or it has no such value.
    """
    forms = get_args(Form)
    banned = {
        site.conv: frozenset(forms[: forms.index(site.form)])
        for site in plan.insert_sites
        if site.form in forms
    }
    banned |= {skip.name: frozenset(forms) for skip in plan.skips if skip.reason is Reason.FORM_BROKE_MODEL}
    for name in plan.options.keys() - InsertOptions().to_dict().keys():
        raise Damaged(f"there is no option {name!r}", "options")
    try:
        options = dataclasses.replace(fitted(dict(plan.options), InsertOptions), banned=banned)
        options.validate()
    except Damaged as error:
        raise error.within("options") from None
    except UsageError as error:
        raise Damaged(error.what, "options") from error
    return options


def _sites(plan: Plan, here: Plan) -> Iterator[str]:
    found = {site.conv: site for site in here.insert_sites}
    refused = {skip.name: skip for skip in here.skips}
    for site in plan.insert_sites:
        if site.conv in found:
            yield from _fields(site, found[site.conv])
        elif site.conv in refused:
            yield f"{site.conv!r} is no place for a BatchNorm: {refused[site.conv].detail}"
        else:
            yield f"it has no layer {site.conv!r}"


def _fields(planned: InsertSite, found: InsertSite) -> Iterator[str]:
    for field in dataclasses.fields(InsertSite):
        ours, theirs = getattr(planned, field.name), getattr(found, field.name)
        # a newcomer's number counts those before it, of which there may be others here
        if ours != theirs and field.name != "bn":
            yield f"{field.name} of {planned.conv!r} is {theirs!r}, the plan expects {ours!r}"


def _biases(plan: Plan, here: Plan) -> Iterator[str]:
    found = {(dropped.conv, dropped.bias, dropped.channels) for dropped in here.dropped}
    for dropped in plan.dropped:
        if (dropped.conv, dropped.bias, dropped.channels) not in found:
            yield f"{dropped.bias!r} cannot move into a BatchNorm"
