"""A plan that holds for several observations of one model, made on inputs of different sizes.

One observation knows one set of sizes. A reshape can look as if it kept the channel axis where an axis
happens to be 1 and mix it elsewhere: such a fold counts only if it comes out the same on every observation.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Sequence

from bntool.folding.planner import plan_fold
from bntool.graph import Graph
from bntool.plan import FoldSite, Plan, Skip
from bntool.reasons import Reason

_DETAIL = "the fold would depend on the size of an axis that is not fixed"


def plan_on_all(
    graphs: Sequence[Graph],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = False,
    unshare: bool = False,
    first: Plan | None = None,
) -> Plan:
    """The plan of the first graph, without the folds that do not come out alike on all of them.

    Where the merges do not come out alike, there are none. `first` is that plan, where it has been made
    already with these options.
    """
    unsettled: set[str] = set()
    while True:
        without = (*exclude, *(glob.escape(name) for name in sorted(unsettled)))
        known = [first] if first is not None and not unsettled else []
        made = (
            plan_fold(graph, include=include, exclude=without, merge=merge, unshare=unshare)
            for graph in graphs[len(known) :]
        )
        plan, *others = (*known, *made)
        if any(other.merges != plan.merges for other in others):
            merge, first = False, None
            continue
        differing = {name for other in others for name in _differing(plan, other)}
        if not differing:
            return _with_reasons(plan, unsettled, exclude)
        unsettled |= differing


def at_graph_level(plan: Plan, hidden: Iterable[tuple[str, str]]) -> Plan:
    """A plan for a graph of its own, with a skip for every BatchNorm in a body that is left alone.

    `hidden` gives each one's name and where it stands.
    """
    left = [Skip(name, Reason.FUNCTIONAL, f"{place}, which is left as it is") for name, place in hidden]
    sites = tuple(dataclasses.replace(site, level="graph") for site in plan.fold_sites)
    return dataclasses.replace(plan, sites=sites, skips=(*plan.skips, *left))


def _differing(plan: Plan, other: Plan) -> list[str]:
    """The BatchNorms that one plan folds and the other does not, or not alike."""
    mine: dict[str, FoldSite] = {site.bn: site for site in plan.fold_sites}
    theirs = {site.bn: site for site in other.fold_sites}
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def _with_reasons(plan: Plan, unsettled: set[str], exclude: Sequence[str]) -> Plan:
    skips = tuple(
        Skip(skip.name, Reason.AXIS_MISMATCH, _DETAIL) if skip.name in unsettled else skip
        for skip in plan.skips
    )
    return dataclasses.replace(plan, skips=skips, options={**plan.options, "exclude": list(exclude)})
