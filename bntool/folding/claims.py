"""Turn what layers take in into edits of their weights, after everything that forbids an edit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bntool.folding.moving import Take, Way
from bntool.folding.norms import Norm
from bntool.graph import Graph, Op, Value
from bntool.laws import Refused
from bntool.laws.taking import bias_from_input_shift, layout_of, rows
from bntool.plan import Edit
from bntool.reasons import Reason

_Side = Literal["scale_output", "scale_input"]


class Claims:
    """Which weights the plan so far changes: biases that it creates, float16 tensors as they stand."""

    def __init__(self, graph: Graph, norm_of: dict[int, Norm]) -> None:
        self.graph = graph
        self.norm_of = norm_of
        self._created_bias: set[str] = set()
        self._halves: dict[str, Tensor] = {}
        self._asked_halves: dict[str, Tensor] = {}

    def edits(self, norm: Norm, way: Way) -> list[Edit]:
        edits: dict[tuple[str, str], Edit] = {}
        self._asked_halves = {}
        for take in way.takes:
            edit = self._edit(take, way)
            known = edits.setdefault((edit.weight, take.side), edit)
            if known.bias != edit.bias or any(
                edit.bias and e.bias == edit.bias and e.weight != edit.weight for e in edits.values()
            ):
                raise Refused(Reason.WEIGHT_SHARED, f"layers beside {take.op.label} share a weight or a bias")
        return [*edits.values(), Edit("remove", norm.name)]

    def _edit(self, take: Take, way: Way) -> Edit:
        """The edit of one layer, after everything that forbids changing its weight."""
        op, vector = take.op, take.vector
        kind: _Side = "scale_output" if take.side == "output" else "scale_input"
        if op.kind == "batch_norm":
            return self._norm_edit(take, kind, way)
        weight = self.graph.input(op, "weight")
        if not weight.handle:
            raise Refused(Reason.WEIGHT_COMPUTED, f"the weight of {op.label} is computed, not stored")
        tensor = self.graph.tensors[weight.handle]
        if not tensor.is_floating_point():
            raise Refused(Reason.QUANTIZED, f"the weight of {op.label} is {tensor.dtype}")
        owner = weight.handle.rpartition(".")[0]
        module = self.graph.modules.get(owner)
        if module is not None and module.role == "scripted":
            raise Refused(Reason.SCRIPTED, f"{op.label} belongs to a TorchScript module")
        self._require_own(weight, take, way)
        bias = ""
        if "bias" in op.inputs:
            bias = self.graph.input(op, "bias").handle
            if not bias:
                raise Refused(Reason.WEIGHT_COMPUTED, f"the bias of {op.label} is computed, not stored")
            if take.side == "output" or vector.has_shift:
                self._require_own(self.graph.input(op, "bias"), take, way)
        elif vector.has_shift or f"{owner}.bias".lstrip(".") in self._created_bias:
            self._require_bias_slot(op, weight, owner)
            bias = f"{owner}.bias" if owner else "bias"
        groups = op.attrs.get("groups", 1)
        edit = Edit(kind, owner, vector.expr, weight.handle, bias, layout_of(op), groups)
        self._require_range(edit, take)
        return edit

    def _require_bias_slot(self, op: Op, weight: Value, owner: str) -> None:
        """A bias may be created only where the call that reads the weight will read it too."""
        module = self.graph.modules.get(owner)
        if module is not None and module.plain_bias and op.scope == owner:
            return
        if len(weight.readers) > 1:
            raise Refused(Reason.WEIGHT_SHARED, f"{weight.handle} is shared, and {op.label} has no bias")
        raise Refused(Reason.CUSTOM_FORWARD, f"{op.label} has no bias, and its own forward may not use one")

    def _norm_edit(self, take: Take, kind: _Side, way: Way) -> Edit:
        """A BatchNorm that stays takes the map in: to its affine it is a depthwise 1×1 convolution."""
        norm = self.norm_of.get(take.op.id)
        module = self.graph.modules.get(norm.name) if norm else None
        if norm is None or norm.affine is None or module is None or len(norm.ops) != 1:
            raise Refused(Reason.CALLED_MORE_THAN_ONCE, f"{take.op.label} cannot take it in")
        handles = [self.graph.input(take.op, r).handle for r in ("weight", "bias") if r in take.op.inputs]
        if len(handles) != 2 or not all(handles):
            raise Refused(Reason.CUSTOM_FORWARD, f"{take.op.label} has no γ and β to take it in")
        for role in ("weight", "bias"):
            self._require_own(self.graph.input(take.op, role), take, way)
        return Edit(kind, norm.name, take.vector.expr, handles[0], handles[1], "norm")

    def _require_own(self, weight: Value, take: Take, way: Way) -> None:
        """Every call that reads the weight must ask for the same change."""
        same = [
            t
            for t in way.takes
            if t.side == take.side and t.vector.equals(take.vector) and weight.id in t.op.inputs.values()
        ]
        taking = {t.op.id for t in same}
        for reader, _ in weight.readers:
            if reader in taking:
                continue
            other = self.graph.ops[reader]
            if other.scope == take.op.scope:
                raise Refused(
                    Reason.CALLED_MORE_THAN_ONCE,
                    f"{take.op.label} runs {len(weight.readers)} times, not always with this BatchNorm",
                )
            raise Refused(Reason.WEIGHT_SHARED, f"{other.label} shares {weight.handle}")
        owner = weight.handle.rpartition(".")[0]
        same_module = {owner, *self.graph.aliases.get(owner, ())}
        for alias in self.graph.aliases.get(weight.handle, ()):
            other_owner = alias.rpartition(".")[0]
            module = self.graph.modules.get(other_owner)
            if other_owner not in same_module and module is not None and module.calls == 0:
                raise Refused(Reason.WEIGHT_SHARED, f"{alias} is {weight.handle}, and did not run")

    def _require_range(self, edit: Edit, take: Take) -> None:
        """Refuse a folded weight or bias that its own type cannot hold (float16 ends at 65,504)."""
        stored = self.graph.tensors[edit.weight]
        if stored.dtype != torch.float16:
            return
        scale, shift = take.vector.scale.to(stored.device), take.vector.shift.to(stored.device)
        weight = self.half(edit.weight)
        after = {edit.weight: weight * rows(edit.layout, weight, edit.groups, scale, take.side)}
        if edit.bias:
            bias = self.half(edit.bias).to(stored.device)
            if take.side == "output":
                after[edit.bias] = scale * bias + shift
            else:
                after[edit.bias] = bias + bias_from_input_shift(edit.layout, weight, edit.groups, shift)
        peak = max(float(t.abs().max()) for t in after.values() if t.numel())
        limit = torch.finfo(torch.float16).max
        if peak > limit:
            raise Refused(
                Reason.OVERFLOW, f"the folded weight of {take.op.label} reaches {peak:.3g}, beyond {limit:g}"
            )
        self._asked_halves.update(after)

    def half(self, handle: str) -> Tensor:
        """A float16 tensor as the folds so far have left it, in float64; zero where there is none."""
        stored = self.graph.tensors.get(handle, torch.zeros(()))
        return self._halves.get(handle, stored.detach().double())

    def made_bias(self, layer: str) -> str:
        """The handle of the bias that a fold makes for a layer; empty where none does."""
        handle = f"{layer}.bias".lstrip(".")
        return handle if handle in self._created_bias else ""

    def commit(self, edits: list[Edit]) -> None:
        """Make these edits part of what later ones see."""
        self._halves.update(self._asked_halves)
        self._created_bias.update(e.bias for e in edits if e.bias and e.bias not in self.graph.tensors)
