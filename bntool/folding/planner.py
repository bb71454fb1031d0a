"""Give every BatchNorm a verdict: upstream, downstream, or split; else the reason why it stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from bntool.core.errors import StateError
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.core.sites import FoldSite, Merge, Skip
from bntool.folding.merging import find_merges
from bntool.folding.moving import Mover, Others
from bntool.folding.norms import Norm, find_norms, why_unfit
from bntool.folding.overwriting import Overwritten, require_no_overwriting
from bntool.folding.traversal import Way
from bntool.folding.weight_edits import Claims
from bntool.graph.affine import Affine, compose
from bntool.graph.dataflow import READS_NUMBERS, Graph
from bntool.laws import Refused

_MAX_PASSES = 4
"""A fold can open the way for a BatchNorm that was kept before; passes end when nothing changes."""


def plan_fold(
    graph: Graph,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = False,
    unshare: bool = False,
) -> Plan:
    """Give every BatchNorm of the graph a verdict: a site with its edits, or a skip with its reason.

    With `merge`, parallel branches that are one convolution become one, and take BatchNorms with them. With
    `unshare`, a call that needs a change of a weight which others read gets a weight of its own, where the
    BatchNorm can go in no other way.
    """
    if any(tensor.is_meta for tensor in graph.tensors.values()):
        raise StateError(
            "the model is on the meta device: it has no numbers to fold",
            where=graph.model_class,
            next_step="load its weights on a real device first",
        )
    with torch.no_grad():
        return _Planner(graph, include, exclude, unshare).plan(merge)


_OTHERS: dict[str, Others] = {"inverse": "undo", "sideways": "give way"}
"""What a direction lets others do."""

_Direction = tuple[str, dict[int, Affine], dict[int, Affine]]
"""Its name, and what moves upstream and what downstream, call by call."""

_Refusal = tuple[str, Reason, str]
"""A direction, why it is no way, and the detail."""


def _sideways(placed: dict[int, Affine]) -> Iterator[_Direction]:
    """The whole map one way or the other, or the shift up; other branches of the sums on the way give way."""
    yield "sideways", {}, placed
    yield "sideways", placed, {}
    scales = {i: m.then("scale_part") for i, m in placed.items()}
    if any(m.has_shift and m.has_scale and bool((m.scale != 0).all()) for m in placed.values()):
        yield "sideways", {i: m.then("unscaled_shift") for i, m in placed.items()}, scales


class _Planner:
    """Holds what the plan so far has changed."""

    def __init__(self, graph: Graph, include: Sequence[str], exclude: Sequence[str], unshare: bool) -> None:
        self.graph = graph
        self.include, self.exclude, self.unshare = tuple(include), tuple(exclude), unshare
        self.norms = find_norms(graph)
        self.norm_of = {op.id: norm for norm in self.norms for op in norm.ops}
        self.gone: set[int] = set()
        self.notes = [READS_NUMBERS] if graph.reads_numbers else []
        self.mover = Mover(graph, self.gone)
        self.claims = Claims(graph, self.norm_of)
        self.sites: list[FoldSite] = []
        self.skips: dict[str, Skip] = {}

    def plan(self, merge: bool) -> Plan:
        waiting = []
        for norm in self.norms:
            norm.unfit = why_unfit(norm, self.graph, self.norm_of, self.include, self.exclude)
            if norm.unfit is None:
                waiting.append(norm)
            else:
                self.skips[norm.name] = Skip(norm.name, norm.unfit.reason, norm.unfit.detail)
        # a clone costs memory: only for what is left when every fold without one is done
        for unshare in (False, True) if self.unshare else (False,):
            for _ in range(_MAX_PASSES):
                kept = self._round(waiting, unshare=unshare)
                if len(kept) == len(waiting):
                    break
                waiting = kept
        # a branch that gives way is a change more: only for what no merge will take with it
        merged = {name for found in self._merges(waiting, merge) for name in found.norms}
        waiting = [norm for norm in waiting if norm.name not in merged]
        self._round(waiting, sideways=True)
        merges = self._merges(self.norms, merge)
        for found in merges:
            for name in found.norms:
                del self.skips[name]
                self.sites.append(FoldSite(name, (found.layer,), ("merge",), ()))
        order = {norm.name: i for i, norm in enumerate(self.norms)}
        return Plan(
            action="fold",
            sites=tuple(self.sites),
            skips=tuple(sorted(self.skips.values(), key=lambda s: order[s.name])),
            model_class=self.graph.model_class,
            signature=self.graph.signature(),
            options={
                "include": list(self.include),
                "exclude": list(self.exclude),
                **({"unshare": True} if self.unshare else {}),
            },
            notes=tuple(self.notes),
            merges=tuple(merges),
            eps={n.name: float(n.ops[0].attrs["eps"]) for n in self.norms if n.affine is not None},
        )

    def _round(self, waiting: list[Norm], *, unshare: bool = False, sideways: bool = False) -> list[Norm]:
        """Try each BatchNorm once; give those that stay, whose reason is why they cannot go by themselves."""
        kept = []
        for norm in waiting:
            try:
                self.sites.append(self._folded(norm, unshare, sideways))
                self.skips.pop(norm.name, None)
            except Refused as refusal:
                if not sideways or isinstance(refusal, Overwritten):
                    self.skips[norm.name] = Skip(norm.name, refusal.reason, refusal.detail)
                kept.append(norm)
        return kept

    def _merges(self, waiting: list[Norm], merge: bool) -> list[Merge]:
        """What merging makes of the graph as it now is, with these BatchNorms among the branches."""
        single = {
            norm.ops[0].id: norm
            for norm in waiting
            if len(norm.ops) == 1 and norm.unfit is None and norm.name in self.skips
        }
        return find_merges(self.mover, self.claims, self.gone, single) if merge else []

    def _folded(self, norm: Norm, unshare: bool, sideways: bool) -> FoldSite:
        """The site of this BatchNorm, without a clone where an earlier one has made that possible."""
        if unshare:
            with contextlib.suppress(Refused):
                return self._fold(norm, False)
        return self._fold(norm, unshare, sideways)

    def _fold(self, norm: Norm, unshare: bool, sideways: bool = False) -> FoldSite:
        """The site of this BatchNorm by the first exact way; refused where there is none."""
        placed = {op.id: norm.placed(self.graph, op) for op in norm.ops}
        refusals: list[_Refusal] = []
        for name, up, down in _sideways(placed) if sideways else self._directions(norm, placed):
            try:
                way = self.mover.find_way(norm, up, down, _OTHERS.get(name, "stay"))
                edits = self.claims.edits(norm, way, unshare=unshare)
                for op in norm.ops:
                    require_no_overwriting(op, self.graph, self.gone)
            except Refused as refusal:
                if sideways and isinstance(refusal, Overwritten):
                    raise  # every other direction would meet it, too
                # the exception itself would hold this frame, which would hold it: a cycle around the graph
                refusals.append((name, refusal.reason, refusal.detail))
                continue
            self._commit(norm, way)
            if way.condition > 1:
                what = f"other readers take the inverse map in, of condition number {way.condition:.2g}"
                self.notes.append(f"{norm.name}: {what}")
            self.claims.commit()
            laws = tuple(dict.fromkeys(way.laws + (["split"] if name == "split" else [])))
            layers = tuple(
                dict.fromkeys(e.layer or e.weight for e in edits if e.kind not in ("remove", "unshare"))
            )
            return FoldSite(norm.name, layers, laws, tuple(edits))
        raise Refused(*refusals[0][1:]) if sideways else self._told(norm, refusals)

    def _told(self, norm: Norm, refusals: list[_Refusal]) -> Refused:
        """The refusal with the deciding reason first: but for that one the BatchNorm would go."""
        if any(reason is Reason.NEGATIVE_SCALE for _, reason, _ in refusals):
            others = self._with_positive_scales(norm)
            # where the signs of its scales are not all that stands in the way, what stays without them is
            refusals = others or sorted(refusals, key=lambda one: one[1] is not Reason.NEGATIVE_SCALE)
        # what algebra allows and the storage type forbids comes first: another type mends it
        refusals.sort(key=lambda one: one[1] is not Reason.OVERFLOW)
        return Refused(refusals[0][1], "; ".join(f"{name}: {detail}" for name, _, detail in refusals[:2]))

    def _with_positive_scales(self, norm: Norm) -> list[_Refusal]:
        """What would stand in the way if no scale were negative; nothing where the BatchNorm would go."""
        assert norm.affine is not None
        positive = Affine(norm.affine.scale.abs(), norm.affine.shift, norm.affine.expr)
        same = Norm(norm.name, norm.ops, positive)
        refusals: list[_Refusal] = []
        for name, up, down in self._directions(same, {op.id: same.placed(self.graph, op) for op in norm.ops}):
            try:
                self.claims.edits(same, self.mover.find_way(same, up, down, _OTHERS.get(name, "stay")))
            except Refused as refusal:
                refusals.append((name, refusal.reason, refusal.detail))
            else:
                return []
        return refusals

    def _directions(self, norm: Norm, placed: dict[int, Affine]) -> Iterator[_Direction]:
        """What moves upstream and what downstream, call by call, in the order to try."""
        yield "upstream", placed, {}
        yield "downstream", {}, placed
        assert norm.affine is not None
        invertible = bool((norm.affine.scale != 0).all())
        if norm.affine.has_shift and norm.affine.has_scale:
            scales = {i: m.then("scale_part") for i, m in placed.items()}
            yield "split", scales, {i: m.then("shift_part") for i, m in placed.items()}
            if invertible:
                yield "split", {i: m.then("unscaled_shift") for i, m in placed.items()}, scales
        if invertible:
            yield "inverse", placed, {}

    def _commit(self, norm: Norm, way: Way) -> None:
        """Make the fold part of what later BatchNorms see."""
        for take in way.takes:
            if take.side == "summand":
                self.mover.changed.add(take.handle)
            taker = self.norm_of.get(take.op.id)
            if take.op.kind == "batch_norm" and taker is not None and taker.affine is not None:
                outer, inner = (
                    (take.vector, taker.affine) if take.side == "output" else (taker.affine, take.vector)
                )
                joined = compose(outer, inner)
                taker.affine = Affine(joined.scale, joined.shift, ("bn", taker.name))
        self.gone.update(op.id for op in norm.ops)
