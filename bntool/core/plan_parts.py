"""A plan as it is shown: a table of verdicts, then what is kept by reason, and the totals. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bntool.core.showing import Column, Part, Said, Table, count, counted, signed, size
from bntool.core.sites import FoldSite, InsertSite, Skip, Unshared

if TYPE_CHECKING:
    from bntool.core.plan import Plan

_SHOWN = 10
_AT_ONCE = ("conv", "linear", "matmul", "batch_norm", "reparameterize")
"""Laws of layers that take in at once: not worth a word."""


def plan_parts(plan: Plan, *, verbose: bool = True) -> Sequence[Part]:
    """What a surgery does, or has done; without `verbose` the totals, and the first of the reasons."""
    parts = list(_insertion(plan, verbose) if plan.action == "insert" else _fold(plan, verbose))
    # a blank line parts the totals from a table, where there is one
    return parts[parts[0] == "" :]


def _insertion(plan: Plan, verbose: bool) -> Iterator[Part]:
    """A line for each new BatchNorm, then the layers that were not cut, and the totals."""
    columns = (
        Column("Layer", flexible=True),
        Column("Activation", flexible=True),
        Column("New BatchNorm", flexible=True),
        Column("Channels", number=True),
        Column("Form"),
    )
    rows = [
        [s.conv or "(root)", s.activation_kind, _newcomers(s), count(s.channels), s.form]
        for s in plan.insert_sites
    ]
    if rows and verbose:
        yield Table(columns, rows)
    yield from _not_cut(plan.skips, verbose)
    number = sum(s.calls for s in plan.insert_sites)
    channels = sum(s.channels * s.calls for s in plan.insert_sites)
    yield ""
    yield f"{counted(number, 'BatchNorm layer')} inserted over {count(channels)} channels"
    if plan.dropped:
        moved = ", ".join(dropped.bias for dropped in plan.dropped)
        yield Said(f"{len(plan.dropped)} biases moved into running means: {moved}")


def _newcomers(site: InsertSite) -> str:
    return site.bn if site.calls == 1 else f"{site.bn}.0-{site.calls - 1}"


def _not_cut(skips: tuple[Skip, ...], verbose: bool) -> Iterator[Part]:
    shown = skips if verbose else skips[:_SHOWN]
    if skips:
        yield ""
    for skip in shown:
        yield Said(f"not cut: {skip.name} [{skip.reason}] {skip.detail}", "    ")
    if len(shown) < len(skips):
        yield f"not cut: {len(skips) - len(shown)} more (-v lists them)"


def _fold(plan: Plan, verbose: bool) -> Iterator[Part]:
    """A line for each BatchNorm, then what is kept by reason, each with its first layer as an example."""
    columns = (Column("BatchNorm", flexible=True), Column("Verdict", flexible=True))
    rows = [[site.bn or "(root)", _verdict(site)] for site in plan.fold_sites]
    rows += [[skip.name, f"kept: {skip.reason}"] for skip in plan.skips]
    if rows and verbose:
        yield Table(columns, rows)
    yield ""
    yield f"{len(plan.sites)} of {len(rows)} BatchNorm layers folded"
    if plan.merges:
        first = plan.merges[0]
        yield (
            f"{len(plan.merges)} sums of parallel branches merged, the first: "
            f"{len(first.branches)} branches into {first.layer}"
        )
    if plan.unshared.layers:
        yield unshared_text(plan.unshared)
    for reason, number in Counter(skip.reason for skip in plan.skips).most_common():
        example = next(skip for skip in plan.skips if skip.reason is reason)
        also = ", the first" if number > 1 else ""
        yield Said(f"kept {number} {reason}{also}: {example.name}: {example.detail}", "    ")


def unshared_text(unshared: Unshared) -> str:
    """What the clones of shared layers add, on one line."""
    layers = counted(len(unshared.layers), "layer")
    return f"unshared {layers}: {signed(unshared.parameters)} parameters, +{size(unshared.bytes)}"


def _verdict(site: FoldSite) -> str:
    """Into what, and through which ops: a layer that takes in at once is not worth a word, nor a module."""
    way = [law for law in site.laws if law not in _AT_ONCE]
    through = f" through {', '.join(way)}" if way else ""
    where = " in the graph" if site.level == "graph" else ""
    code, _, _ = site.untrained.partition(":")
    now = f"; once trained it would stay: {code}" if code else ""
    return f"folded into {', '.join(site.into)}{through}{where}{now}"
