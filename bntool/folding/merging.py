"""Parallel linear branches over one value that are added: where they are, and what they become.

Every value is looked at as a sum of branches over an earlier value: convolutions of it and the value itself,
each with an affine map behind. A sum whose inner values nobody else reads is one convolution where the law of
`laws.merging` says so, and where that costs no more weights than the branches had. In a module tree the
forward goes on adding (`absorbed_branches`), so there a sum may have more beside its branches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping

import torch

from bntool.core.sites import Branch, Merge
from bntool.folding.absorbed_branches import adds_a_constant, can_be_heir, layers_that_go, undone
from bntool.folding.norms import Norm
from bntool.folding.weight_edits import Claims
from bntool.graph.affine import Affine, Constant, compose, identity
from bntool.graph.dataflow import Graph, Op
from bntool.laws import Context, Refused
from bntool.laws.base import constant_operand
from bntool.laws.merging import added_up, identity_window, joined, window_of
from bntool.laws.taking import channel_axis, output_demand

_ROOTS = frozenset({"add", "sub", "mul", "div", "batch_norm"})


@dataclasses.dataclass(frozen=True)
class _Sum:
    """Branches over one value: each a convolution (None: the value itself) and the map behind it.

    `members` are the ops that do nothing else. `open` where a forward adds what is no branch of it: the
    values `beside`.
    """

    terms: tuple[tuple[Op | None, Affine], ...]
    members: frozenset[int] = frozenset()
    open: bool = False
    beside: frozenset[int] = frozenset()

    def then(self, outer: Affine, op: Op) -> _Sum:
        """This sum after an affine map: its scale for every branch, its shift for one."""
        bare = outer.then("scale_part")
        terms = [(conv, compose(bare if i else outer, own)) for i, (conv, own) in enumerate(self.terms)]
        return dataclasses.replace(self, terms=tuple(terms), members=self.members | {op.id})

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(
            self.terms + other.terms,
            self.members | other.members,
            self.open or other.open,
            self.beside | other.beside,
        )


def find_merges(context: Context, claims: Claims, gone: set[int], kept: Mapping[int, Norm]) -> list[Merge]:
    """Every sum that is one convolution, the largest first; `kept` are the BatchNorms that may yet go."""
    return _Merger(context, claims, gone, kept).find()


class _Merger:
    def __init__(self, context: Context, claims: Claims, gone: set[int], kept: Mapping[int, Norm]) -> None:
        self.context, self.claims, self.gone, self.kept = context, claims, gone, kept
        self.graph: Graph = context.graph
        self.in_tree = not self.graph.rewirable
        self.source: dict[int, int] = {}
        self.sums: dict[int, dict[int, _Sum]] = {}

    def find(self) -> list[Merge]:
        for op in self.graph.ops:
            self._read(op)
        merges: list[Merge] = []
        used: set[int] = set()
        for op in reversed(self.graph.ops):
            if op.kind not in _ROOTS or self._is_nothing(op) or len(op.outputs) != 1:
                continue
            found = self.sums.get(op.outputs[0], {})
            for source, total in sorted(found.items(), key=lambda item: -len(item[1].members)):
                if used.isdisjoint(total.members) and (made := self._merge(op, source, total)):
                    merges.append(made)
                    used |= total.members
                    break
        return merges[::-1]

    # -- every value as a sum ---------------------------------------------------------------------------

    def _is_nothing(self, op: Op) -> bool:
        """Whether an op hands its input on as it is."""
        if op.id in self.gone:
            return True
        same = op.kind == "identity" and len(op.outputs) == 1 and "input" in op.inputs
        return same and self.graph.input(op).dtype == self.graph.output(op).dtype

    def _origin(self, value: int) -> int:
        return self.source.get(value, value)

    def _sums_of(self, value: int) -> dict[int, _Sum]:
        """By the value they are over; each value is also the sum of itself alone."""
        itself = _Sum(((None, identity(len(self.graph.values[value].shape))),))
        return {**self.sums.get(value, {}), self._origin(value): itself}

    def _read(self, op: Op) -> None:
        if self._is_nothing(op):
            value, made = op.inputs["input"], op.outputs[0]
            self.source[made] = self._origin(value)
            passed = self.sums.get(value, {}).items()
            self.sums[made] = {s: dataclasses.replace(t, members=t.members | {op.id}) for s, t in passed}
        elif len(op.outputs) == 1:
            try:
                self.sums[op.outputs[0]] = self._sums_after(op)
            except Refused:
                return

    def _sums_after(self, op: Op) -> dict[int, _Sum]:
        output = self.graph.output(op)
        rank = len(output.shape)
        if op.kind == "conv":
            whole = _Sum(((op, identity(rank)),), frozenset({op.id}))
            return {self._origin(op.inputs["input"]): whole}
        if op.kind == "batch_norm" and op.id in self.kept:
            return self._mapped(op, "input", self.kept[op.id].placed(self.graph, op))
        if op.kind not in ("add", "sub", "mul", "div"):
            return {}
        data = [role for role in op.reads if not self.graph.input(op, role).constant]
        if any(self.graph.input(op, role).shape != output.shape for role in data):
            return {}
        if op.kind in ("mul", "div"):
            if len(data) != 1 or (op.kind == "div" and data != ["input"]):
                return {}
            factor = constant_operand(self.context, op, data[0])
            power = 1 if op.kind == "mul" else -1
            return self._mapped(op, data[0], identity(rank).then_constant("times", factor, power))
        if op.attrs["alpha"] is None:
            return {}  # it may have been read from the data
        weighed = op.attrs["alpha"] if op.kind == "add" else -op.attrs["alpha"]
        second = op.reads[-1] if len(op.reads) == 2 else ""
        if self.in_tree and (len(data) == 2 or adds_a_constant(op)):
            outers = (
                _times(rank, weighed) if role == second and weighed != 1 else identity(rank) for role in data
            )
            return self._added_in_forward(op, dict(zip(data, outers, strict=True)))
        if len(data) == 1 and not self.in_tree:
            constant = constant_operand(self.context, op, data[0])
            turned = _times(rank, weighed) if data[0] == second else identity(rank)
            return self._mapped(
                op, data[0], turned.then_constant("plus", constant, 1.0 if data[0] == second else weighed)
            )
        if len(data) != 2:
            return {}
        left = self._mapped(op, data[0], identity(rank))
        right = self._mapped(op, data[1], _times(rank, weighed) if weighed != 1 else identity(rank))
        return {source: left[source].plus(right[source]) for source in left if source in right}

    def _added_in_forward(self, op: Op, behind: dict[str, Affine]) -> dict[int, _Sum]:
        """The sums with whatever else the forward adds to them: constants, the value itself, any other."""
        found: dict[int, list[tuple[int, _Sum]]] = {}
        for role, outer in behind.items():
            value = self.graph.input(op, role)
            for source, total in self.sums.get(value.id, {}).items() if len(value.readers) == 1 else ():
                found.setdefault(source, []).append((value.id, total.then(outer, op)))
        sums: dict[int, _Sum] = {}
        for source, parts in found.items():
            (value_id, total), *other = parts
            others = frozenset(op.inputs.values()) - {value_id}
            opened = dataclasses.replace(total, open=True, beside=total.beside | others)
            sums[source] = total.plus(other[0][1]) if other else opened
        return sums

    def _mapped(self, op: Op, role: str, outer: Affine) -> dict[int, _Sum]:
        sums = self._sums_of(op.inputs[role]).items()
        return {source: total.then(outer, op) for source, total in sums if not total.open}

    # -- what one becomes -------------------------------------------------------------------------------

    def _merge(self, root: Op, source: int, total: _Sum) -> Merge | None:
        convs = list({conv.id: conv for conv, _ in total.terms if conv is not None}.values())
        norms = [self.kept[i].name for i in sorted(total.members) if i in self.kept and i not in self.gone]
        worth = bool(convs) and (len(convs) > 1 or bool(norms))
        if not worth or not self._is_closed(root, source, total.members):
            return None
        if any(self.graph.values[value].producer in total.members for value in total.beside):
            return None  # the sum adds one of its own branches once more
        if not all(self._is_own(conv) for conv in convs):
            return None
        weights = {conv.id: self.graph.input(conv, "weight") for conv in convs}
        dims = int(convs[0].attrs["dims"])
        shape = self.graph.output(root).shape
        plain = identity_window(dims, shape[channel_axis(convs[0], len(shape))])
        windows = [
            plain if conv is None else window_of(conv, weights[conv.id].shape[2:]) for conv, _ in total.terms
        ]
        known = [window for window in windows if window is not None]
        window = joined(known) if len(known) == len(windows) else None
        if window is None:
            return None
        rows, per_group = weights[convs[0].id].shape[:2]
        width = per_group * int(convs[0].attrs["groups"]) // window.groups
        if rows * width * math.prod(window.kernel) > sum(math.prod(w.shape) for w in weights.values()):
            return None
        by_size = sorted(convs, key=lambda conv: -math.prod(weights[conv.id].shape))
        heir, going, undo = self._heir(root, total, by_size)
        if heir is None:
            return None
        try:
            vectors = [output_demand(self.context, heir, compose(undo, own)) for _, own in total.terms]
        except Refused:
            return None
        branches = []
        for (conv, _), vector, own in zip(total.terms, vectors, known, strict=True):
            handles = ("", "", "") if conv is None else self._handles(conv)
            branches.append(Branch(*handles, vector.expr, own))
        layer, weight, bias = self._handles(heir)
        if not bias and (any(b.bias for b in branches) or any(v.has_shift for v in vectors)):
            bias = f"{layer}.bias".lstrip(".")
        made = Merge(layer, weight, bias, window, tuple(branches), tuple(norms), going)
        return made if self._fits(made, vectors) else None

    def _heir(self, root: Op, total: _Sum, convs: list[Op]) -> tuple[Op | None, tuple[str, ...], Affine]:
        """The convolution that becomes the sum, none where none can; the names of what goes by that, and what
        undoes the products that a forward still makes of what it gives.
        """
        alone = identity(len(self.graph.output(root).shape))
        if not self.in_tree:
            going = sorted(total.members - self.gone - {convs[0].id})
            names = tuple(self.graph.output(self.graph.ops[i]).name for i in going)
            return (convs[0] if all(names) else None), names, alone
        for heir in convs:
            with contextlib.suppress(Refused):
                can_be_heir(self.graph, heir)
                members = total.members
                names, factors = layers_that_go(self.graph, self.gone, self.kept, root, members, heir)
                return heir, names, undone(self.context, factors, alone.rank)
        return None, (), alone

    def _is_closed(self, root: Op, source: int, members: frozenset[int]) -> bool:
        """Whether nobody else sees the values in between, and all are of one type."""
        dtype = self.graph.values[source].dtype
        for i in members:
            op = self.graph.ops[i]
            value = self.graph.output(op)
            if value.dtype != dtype or len(op.outputs) != 1:
                return False
            # what is written to must be the region's own
            if op.inplace and any(self.graph.input(op, r).producer not in members for r in op.writes):
                return False
            if i != root.id and (
                value.is_output
                or value.escapes
                or value.watched
                or any(reader not in members for reader, _ in value.readers)
            ):
                return False
        return True

    def _is_own(self, conv: Op) -> bool:
        """Whether weight and bias are stored floating-point tensors that only this call reads."""
        for role in ("weight", "bias"):
            if role not in conv.inputs:
                continue
            value = self.graph.input(conv, role)
            stored = self.graph.tensors.get(value.handle) if value.handle else None
            if stored is None or not stored.is_floating_point() or len(value.readers) != 1:
                return False
        return True

    def _handles(self, conv: Op) -> tuple[str, str, str]:
        weight = self.graph.input(conv, "weight").handle
        layer = weight.rpartition(".")[0]
        bias = self.graph.input(conv, "bias").handle if "bias" in conv.inputs else ""
        return layer, weight, bias or self.claims.made_bias(layer)

    def _fits(self, merge: Merge, vectors: list[Affine]) -> bool:
        """Whether float16 can hold the sum."""
        stored = self.graph.tensors[merge.weight]
        if stored.dtype != torch.float16:
            return True
        terms = (
            (
                self.claims.half(branch.weight) if branch.weight else None,
                self.claims.half(branch.bias) if branch.bias else None,
                branch.window,
                vector.scale,
                vector.shift,
            )
            for branch, vector in zip(merge.branches, vectors, strict=True)
        )
        limit = torch.finfo(torch.float16).max
        return all(float(part.abs().max()) <= limit for part in added_up(terms, merge.window))


def _times(rank: int, number: float) -> Affine:
    constant = Constant.of(torch.tensor(number, dtype=torch.float64), "", rank)
    return identity(rank).then_constant("times", constant, 1)
