"""Carry out a plan's edits on the tensors of a model of any kind.

Each kind of model says where its tensors are, and puts new ones there; what they are is computed here. All
edits of a tensor are composed in float64, and rounded once, when the model gets it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bntool.core.errors import InvariantError, PlanError, StateError
from bntool.core.plan import Plan
from bntool.core.sites import Branch, Edit, Merge
from bntool.graph.affine import batch_norm_affine, is_finite
from bntool.graph.steps import Pair, evaluate
from bntool.laws.merging import added_up
from bntool.laws.taking import bias_from_input_shift, rows
from bntool.surgery.tensors import cast_like, norm_taking_in, scaled

Slot = Hashable
"""Stands for one tensor, whoever shares it, and also for one that is yet to be made."""
Role = Literal["weight", "bias"]
ROLES: tuple[Role, Role] = ("weight", "bias")


class StoredNorm(NamedTuple):
    """Where γ and β of a BatchNorm are, or would be; its statistics, and ε."""

    gamma: Slot
    beta: Slot
    mean: Tensor
    variance: Tensor
    eps: float


class TensorSource(Protocol):
    """The tensors of a model, as they were before any edit."""

    def slot(self, part: Edit | Branch | Merge, role: Role) -> Slot:
        """The tensor that part of a plan calls its weight or its bias."""

    def norm(self, name: str) -> StoredNorm:
        """A BatchNorm by its name."""

    def constant(self, handle: str) -> Tensor:
        """A tensor that a map reads."""

    def stored(self, slot: Slot) -> Tensor | None:
        """The numbers of a tensor; None where there is none yet."""

    def like(self, slot: Slot) -> Tensor:
        """Any tensor of the type, device and memory format in which that of the slot is kept, or will be."""


class TensorStore(TensorSource, Protocol):
    """The same of a model that takes new tensors."""

    def put(self, slot: Slot, tensor: Tensor) -> None:
        """Put a new tensor in the place of the old one, for all who share it; make it where there is none.

        Comes once for a slot, after every edit. Nothing is read from the slot afterwards.
        """

    def unshare(self, edit: Edit) -> Iterable[tuple[Slot, Slot]]:
        """Give a call site tensors of its own: which slot each was cloned from, and the clone's."""


def apply_edits(store: TensorStore, plan: Plan) -> Edits:
    """Every edit and every merge of a fold's plan, on the tensors alone, which are put one by one.

    Returns what was asked of the tensors; those that a merge made are not in it.
    """
    edits = Edits(store)
    with torch.no_grad():
        for edit in (edit for site in plan.fold_sites for edit in site.edits):
            if edit.kind == "unshare":
                edits.hand_on(store.unshare(edit))
            elif edit.map is not None:
                edits.change(edit)
        for merge in plan.merges:
            for slot, tensor in edits.merged(merge):
                store.put(slot, tensor)
        for slot in edits.changed({*removed_norms(plan), *(n for merge in plan.merges for n in merge.norms)}):
            store.put(slot, edits.rounded(slot))
    return edits


def removed_norms(plan: Plan) -> list[str]:
    """The BatchNorms that go by an edit; those that go with a merge are named there."""
    return [edit.layer for site in plan.fold_sites for edit in site.edits if edit.kind == "remove"]


class Edits:
    """What edits so far ask of every tensor.

    Of a weight the factors alone are kept, and its numbers are read when it is rounded. Vectors (biases, γ
    and β) are kept as they then are, in float64 on the CPU.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._factors: dict[Slot, list[tuple[Edit, Tensor]]] = {}
        self._vectors: dict[Slot, Tensor] = {}
        self._norms: dict[str, StoredNorm] = {}
        self._pairs: dict[str, Pair] = {}

    def change(self, edit: Edit) -> None:
        """One edit by a map, after those before it."""
        assert edit.map is not None
        scale, shift = evaluate(edit.map, self.leaf)
        if edit.layout == "norm":
            self._change_norm(edit, (scale, shift))
            return
        slot = self.source.slot(edit, "weight")
        if edit.layout == "summand":
            numbers = self._exact(slot)
            if numbers is None:
                raise InvariantError(f"the plan edits {edit.weight}, which the model does not have")
            self._vectors[slot] = scale * numbers.cpu() + shift
            return
        if edit.bias or shift.count_nonzero():
            self._change_bias(edit, slot, scale, shift)
        self._factors.setdefault(slot, []).append((edit, scale))

    def hand_on(self, clones: Iterable[tuple[Slot, Slot]]) -> None:
        """Clones have seen what the tensors have that they were made from."""
        for old, new in clones:
            if old in self._factors:
                self._factors[new] = list(self._factors[old])
            if old in self._vectors:
                self._vectors[new] = self._vectors[old]

    def leaf(self, kind: str, name: str) -> Any:
        """What a map reads: a BatchNorm as the edits so far have left it, or a tensor, which none changes."""
        if kind == "tensor":
            return self.source.constant(name)
        if name not in self._pairs:
            norm = self.source.norm(name)
            pair = batch_norm_affine(self._exact(norm.gamma), self._exact(norm.beta), *norm[2:])
            if not is_finite(pair):
                raise StateError(
                    f"the statistics of BatchNorm {name} are not finite, or its variance is negative",
                    next_step="make a new plan for these weights: it says which channel",
                )
            self._pairs[name] = pair
        return self._pairs[name]

    def merged(self, merge: Merge) -> Iterator[tuple[Slot, Tensor]]:
        """The tensors of the one convolution that parallel branches become, and none for the branches."""

        def part(branch: Branch, role: Role) -> Tensor | None:
            return self._exact(self.source.slot(branch, role)) if getattr(branch, role) else None

        parts = ((part(b, "weight"), part(b, "bias"), b) for b in merge.branches)
        terms = ((w, b, branch.window, *evaluate(branch.map, self.leaf)) for w, b, branch in parts)
        weight, bias = added_up(terms, merge.window)
        for slot in (self.source.slot(b, role) for b in merge.branches for role in ROLES if getattr(b, role)):
            self._factors.pop(slot, None)
            self._vectors.pop(slot, None)
        for role, tensor in zip(ROLES, (weight, bias.expand(len(weight))), strict=True):
            if getattr(merge, role):
                slot = self.source.slot(merge, role)
                yield slot, cast_like(tensor, self.source.like(slot))

    def changed(self, going: Iterable[str] = ()) -> list[Slot]:
        """Every slot that gets a new tensor; none for the BatchNorms that are going."""
        gone = {slot for name in going if name in self._norms for slot in self._norms[name][:2]}
        return [slot for slot in (*self._factors, *self._vectors) if slot not in gone]

    def rounded(self, slot: Slot) -> Tensor:
        """The new tensor of a slot, in the type in which it is kept."""
        like = self.source.like(slot)
        if slot in self._vectors:
            return cast_like(self._vectors[slot], like)
        return self._weight(slot, like.dtype)

    def exact(self, slot: Slot) -> Tensor:
        """The numbers of a changed tensor in float64, as they are before they are rounded."""
        found = self._exact(slot)
        assert found is not None
        return found

    def length(self, slot: Slot) -> int:
        """How many numbers a changed bias has."""
        return len(self._vectors[slot])

    # -- numbers ----------------------------------------------------------------------------------------

    def _change_bias(self, edit: Edit, weight: Slot, scale: Tensor, shift: Tensor) -> None:
        """At the output b' = s·b + t; at the input b + Σ W·t, with the weight as it is before this edit."""
        if not edit.bias:
            raise PlanError(
                f"the plan makes no bias for {edit.layer}, and these weights need one: the BatchNorm "
                "that it was made from shifted nothing",
                next_step="make the plan from a trained checkpoint of the same architecture",
            )
        slot = self.source.slot(edit, "bias")
        held = self._exact(slot)
        old = torch.zeros((), dtype=torch.float64) if held is None else held.cpu()
        if edit.kind == "scale_output":
            self._vectors[slot] = scale * old + shift
        elif held is None or shift.count_nonzero():
            numbers = self._weight(weight, torch.float64)
            summand = bias_from_input_shift(edit.layout, numbers, edit.groups, shift.to(numbers.device))
            self._vectors[slot] = old + summand.cpu()

    def _change_norm(self, edit: Edit, pair: Pair) -> None:
        norm = self._norms[edit.layer] = self.source.norm(edit.layer)
        mean, variance = norm.mean.to("cpu", torch.float64), norm.variance.to("cpu", torch.float64)
        gamma, beta = self._exact(norm.gamma), self._exact(norm.beta)
        gamma = torch.ones_like(mean) if gamma is None else gamma.cpu()
        beta = torch.zeros_like(mean) if beta is None else beta.cpu()
        new = norm_taking_in(edit.kind, gamma, beta, mean, variance, norm.eps, pair)
        self._vectors[norm.gamma], self._vectors[norm.beta] = new
        self._pairs.clear()

    def _exact(self, slot: Slot) -> Tensor | None:
        """A tensor in float64 as the edits so far have left it; None where there is none yet."""
        if slot in self._vectors:
            return self._vectors[slot]
        if slot in self._factors:
            return self._weight(slot, torch.float64)
        stored = self.source.stored(slot)
        return stored if stored is None else stored.double()

    def _weight(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """A weight after its edits in `dtype`; before any, as it is stored: it may be large."""
        weight = self.source.stored(slot)
        if weight is None:
            raise InvariantError(f"the plan edits {slot}, which the model does not have")
        factors = [
            rows(e.layout, weight, e.groups, scale.to(weight.device), e.kind.removeprefix("scale_"))
            for e, scale in self._factors.get(slot, ())
        ]
        return scaled(weight, factors, dtype) if factors else weight
