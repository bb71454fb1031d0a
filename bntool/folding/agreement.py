"""A plan that holds for several observations of one model, made on inputs of different sizes.

One observation knows one set of sizes. A reshape can look as if it kept the channel axis where an axis
happens to be 1 and mix it elsewhere: such a fold counts only if it comes out the same on every observation.
"""

from __future__ import annotations

import dataclasses
import glob
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import Expr, FoldSite, Skip
from bntool.core.tolerances import SAME_NUMBER
from bntool.folding.planner import plan_fold
from bntool.graph.dataflow import Graph
from bntool.graph.steps import evaluate

_DETAIL = "the fold would come out otherwise on an input of other sizes or numbers"
_ELSEWHERE = "on an input of other sizes or numbers"


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
    unsettled: dict[str, Skip] = {}
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
        differing = {
            name: skip
            for other, graph in zip(others, graphs[1:], strict=True)
            for name, skip in _differing(plan, other, graphs[0], graph)
        }
        if not differing:
            return _with_reasons(plan, unsettled, exclude)
        unsettled = {**differing, **unsettled}


def at_graph_level(plan: Plan, hidden: Iterable[tuple[str, str]]) -> Plan:
    """A plan for a graph of its own, with a skip for every BatchNorm in a body that is left alone.

    `hidden` gives each one's name and where it stands.
    """
    left = [Skip(name, Reason.FUNCTIONAL, f"{place}, which is left as it is") for name, place in hidden]
    sites = tuple(dataclasses.replace(site, level="graph") for site in plan.fold_sites)
    return dataclasses.replace(plan, sites=sites, skips=(*plan.skips, *left))


def _differing(plan: Plan, other: Plan, graph: Graph, elsewhere: Graph) -> Iterator[tuple[str, Skip]]:
    """The BatchNorms that one plan folds and the other does not, or not alike, and why each stays."""
    mine, theirs = ({site.bn: site for site in one.fold_sites} for one in (plan, other))
    kept, kept_elsewhere = ({skip.name: skip for skip in one.skips} for one in (plan, other))
    for name in {**mine, **theirs}:
        if name not in mine:
            yield name, kept.get(name, Skip(name, Reason.AXIS_MISMATCH, _DETAIL))
        elif name not in theirs and name in kept_elsewhere:
            skip = kept_elsewhere[name]
            if skip.reason is Reason.EXCLUDED:  # another one was, since it does not come out alike itself
                yield name, Skip(name, Reason.AXIS_MISMATCH, _DETAIL)
            elif skip.reason is not Reason.NOT_OBSERVED:
                yield name, dataclasses.replace(skip, detail=f"{_ELSEWHERE}: {skip.detail}")
            elif taker := _still_runs(mine[name], elsewhere):
                yield name, Skip(name, Reason.WEIGHT_SHARED, f"{_ELSEWHERE} {taker} runs without it")
        elif not _alike(mine[name], theirs.get(name), graph):
            yield name, Skip(name, Reason.AXIS_MISMATCH, _DETAIL)


def _still_runs(site: FoldSite, graph: Graph) -> str:
    """The first layer that the fold would change and that this graph reads, or nothing."""
    read = {value.handle for value in graph.values if value.handle and value.readers}
    return next((edit.layer for edit in site.edits if {edit.weight, edit.bias} & read), "")


def _alike(mine: FoldSite | None, theirs: FoldSite | None, graph: Graph) -> bool:
    """Whether two folds of one BatchNorm make the same edits.

    A map may come to the same by other sizes on the way (over batch and heads in one axis, say): it is the
    same map if it is so for numbers drawn at random, which rational functions that differ almost never are.
    """
    if mine == theirs or mine is None or theirs is None:
        return mine == theirs
    maps = [[edit.map for edit in site.edits] for site in (mine, theirs)]
    if _without_maps(mine) != _without_maps(theirs):
        return False
    return all(a == b or _same_map(a, b, graph) for a, b in zip(*maps, strict=True))


def _without_maps(site: FoldSite) -> FoldSite:
    """Without the ops on the way too, since some, like `contiguous`, are only there for some sizes."""
    edits = tuple(dataclasses.replace(edit, map=None) for edit in site.edits)
    return dataclasses.replace(site, edits=edits, laws=())


def _same_map(first: Expr | None, second: Expr | None, graph: Graph) -> bool:
    if first is None or second is None:
        return False
    channels = {op.scope: graph.input(op, "running_var").shape[-1] for op in graph.of_kind("batch_norm")}

    def drawn(kind: str, name: str) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
        shape = (2, channels[name]) if kind == "bn" else graph.tensors[name].shape
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers[0], numbers[1]) if kind == "bn" else numbers

    (scale, shift), (scale_2, shift_2) = evaluate(first, drawn), evaluate(second, drawn)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=SAME_NUMBER, atol=0.0, equal_nan=True)
        for a, b in ((scale, scale_2), (shift, shift_2))
    )


def _with_reasons(plan: Plan, unsettled: dict[str, Skip], exclude: Sequence[str]) -> Plan:
    skips = tuple(unsettled.get(skip.name, skip) for skip in plan.skips)
    return dataclasses.replace(plan, skips=skips, options={**plan.options, "exclude": list(exclude)})
