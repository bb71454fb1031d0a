"""BatchNorms that have seen no batch fold through more than trained ones: their shift is zero.

A zero shift passes a ReLU and a padding that a trained one does not. What a fold rests on that is told by
planning once more, as if the statistics had been measured.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from bntool.core.plan import Plan
from bntool.core.sites import FoldSite, Skip
from bntool.folding.norms import Norm, find_norms
from bntool.folding.planner import plan_fold
from bntool.graph.dataflow import Graph


def with_untrained_told(plan: Plan, graph: Graph) -> Plan:
    """The plan of a fold with a note on the BatchNorms that have seen no batch, and on each that would stay
    with measured statistics that remark (`FoldSite.untrained`).

    Args:
        plan: of a fold, by whatever ways.
        graph: of the model as it was.
    """
    fresh = [norm for norm in find_norms(graph) if _saw_no_batch(norm, graph)]
    names = {norm.name for norm in fresh}
    folded = [site.bn for site in plan.fold_sites if site.bn in names]
    if not folded:
        return plan
    if all(_fits_any_shift(site, graph) for site in plan.fold_sites):
        return dataclasses.replace(plan, notes=(*plan.notes, note_on_untrained(folded)))
    options: dict[str, Any] = {
        "include": tuple(plan.options.get("include", ("*",))),
        "exclude": tuple(plan.options.get("exclude", ())),
        "unshare": bool(plan.options.get("unshare", False)),
    }
    by_law = not plan.merges and all(site.edits for site in plan.fold_sites)
    folds = plan if by_law else plan_fold(graph, **options)
    now = {site.bn for site in folds.fold_sites}
    trained = plan_fold(_as_if_trained(graph, fresh), **options)
    stays = {skip.name: skip for skip in trained.skips if skip.name in now}
    sites = tuple(
        dataclasses.replace(site, untrained=_why(stays[site.bn])) if site.bn in stays else site
        for site in plan.fold_sites
    )
    return dataclasses.replace(plan, sites=sites, notes=(*plan.notes, note_on_untrained(folded, [*stays])))


def _fits_any_shift(site: FoldSite, graph: Graph) -> bool:
    """Whether a layer right before the BatchNorm takes it in, whatever its statistics are: it has a bias, or
    one call and a place for one.
    """
    if len(site.laws) != 1 or {edit.kind for edit in site.edits} != {"scale_output", "remove"}:
        return False
    for edit in site.edits:
        layer = graph.modules.get(edit.layer)
        own = edit.weight == f"{edit.layer}.weight" and not graph.aliases
        roomy = layer is not None and layer.plain_bias and layer.calls == 1 and own
        if edit.kind == "scale_output" and not (edit.bias or roomy):
            return False
    return True


def _saw_no_batch(norm: Norm, graph: Graph) -> bool:
    """By its count of batches where it has one, else by statistics as a new layer has them."""
    roles = norm.ops[0].inputs if norm.ops else {}
    if "running_mean" not in roles or "running_var" not in roles:
        return False
    count = graph.tensors.get(f"{norm.name}.num_batches_tracked")
    if count is not None:
        return not bool(count.any())
    mean, variance = (graph.constant(graph.input(norm.ops[0], r)) for r in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


def _as_if_trained(graph: Graph, fresh: Sequence[Norm]) -> Graph:
    """The same graph with statistics that differ from channel to channel, and shift."""
    trained = copy.copy(graph)
    trained.tensors = dict(graph.tensors)
    for norm in fresh:
        for role in ("running_mean", "running_var"):
            handle = graph.input(norm.ops[0], role).handle
            tensor = graph.tensors.get(handle)
            if tensor is not None:
                measured = torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device)
                trained.tensors[handle] = measured.to(tensor.dtype).reshape(tensor.shape)
    return trained


def _why(skip: Skip) -> str:
    return f"{skip.reason}: {skip.detail}"


def note_on_untrained(folded: Sequence[str], stays: Sequence[str] = ()) -> str:
    """What is said of folded BatchNorms that have seen no batch, and of those that would else stay."""
    text = f"{len(folded)} folded BatchNorm{'s have' if len(folded) > 1 else ' has'} seen no batch yet"
    if not stays:
        return f"{text} ({_listed(folded)})"
    return f"{text}; with measured statistics {len(stays)} of them would stay: {_listed(stays)}"


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
