"""Turn what layers take in into edits of their weights, after everything that forbids an edit."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from typing import Any, Literal

import torch
from torch import Tensor

from bntool.core.reasons import Reason
from bntool.core.sites import Edit
from bntool.folding.norms import Norm
from bntool.folding.sharing import Sharing
from bntool.folding.traversal import Take, Way
from bntool.graph.dataflow import Edge, Graph, Op
from bntool.laws import Refused
from bntool.laws.taking import bias_from_input_shift, channel_axis, layout_of, rows

_Side = Literal["scale_output", "scale_input"]


@dataclasses.dataclass
class _State:
    """What a plan changes: who reads what, biases that it creates, float16 tensors as they then are."""

    sharing: Sharing
    created_bias: ChainMap[str, None] = dataclasses.field(default_factory=ChainMap)
    halves: ChainMap[str, Tensor] = dataclasses.field(default_factory=ChainMap)

    def tried(self) -> _State:
        """This state with room on top for changes that may not last."""
        return _State(self.sharing.copy(), self.created_bias.new_child(), self.halves.new_child())

    def settle(self, tried: _State) -> None:
        """Take over what was changed on top."""
        self.sharing = tried.sharing
        self.created_bias.update(tried.created_bias.maps[0])
        self.halves.update(tried.halves.maps[0])


class Claims:
    """Which weights the plan so far changes; what is asked for last counts once it is committed."""

    def __init__(self, graph: Graph, norm_of: dict[int, Norm]) -> None:
        self.graph = graph
        self.norm_of = norm_of
        self._settled = _State(Sharing(graph))
        self._before = self._asked = self._settled
        self._unshare = False
        self._clones: dict[str, Edit] = {}
        self._takes: dict[tuple[str, int], Take] = {}
        self._own: set[tuple[str, Edge]] = set()

    def edits(self, norm: Norm, way: Way, *, unshare: bool = False) -> list[Edit]:
        """The edits that carry a way out; refused where a layer must not change.

        With `unshare`, a call whose weight or bias others read in another way gets its own first.
        """
        self._before, self._asked = self._settled.tried(), self._settled.tried()
        self._unshare, self._clones = unshare, {}
        self._takes, self._own = {(take.side, take.op.id): take for take in way.takes}, set()
        edits: dict[tuple[str, str], Edit] = {}
        for take in way.takes:
            edit = self._edit(take)
            known = edits.setdefault((edit.weight, take.side), edit)
            if known is not edit and dataclasses.replace(known, map=edit.map) != edit:
                raise Refused(Reason.WEIGHT_SHARED, f"layers beside {take.op.label} share a weight or a bias")
        return [*self._clones.values(), *edits.values(), Edit("remove", norm.name)]

    def commit(self) -> None:
        """Make the edits asked for last part of what later ones see."""
        self._settled.settle(self._asked)

    def _edit(self, take: Take) -> Edit:
        """The edit of one layer, after everything that forbids changing its weight."""
        if take.side == "summand":
            return self._summand_edit(take)
        op, vector = take.op, take.vector
        kind: _Side = "scale_output" if take.side == "output" else "scale_input"
        if op.kind == "batch_norm":
            return self._norm_edit(take, kind)
        weight = self.graph.input(op, "weight")
        if not weight.handle:
            known = self.graph.modules.get(op.scope)
            layer = known is not None and known.role in ("conv", "linear") and self.graph.is_computed(weight)
            way_out = "; --bake stores it" if layer else ""
            raise Refused(
                Reason.WEIGHT_COMPUTED, f"the weight of {op.label} is computed, not stored{way_out}"
            )
        tensor = self.graph.tensors[weight.handle]
        if not tensor.is_floating_point():
            raise Refused(Reason.QUANTIZED, f"the weight of {op.label} is {tensor.dtype}")
        module = self.graph.modules.get(weight.handle.rpartition(".")[0])
        if module is not None and module.role == "scripted":
            raise Refused(Reason.SCRIPTED, f"{op.label} belongs to a TorchScript module")
        self._require_own("weight", take)
        bias = ""
        if "bias" in op.inputs:
            if not self.graph.input(op, "bias").handle:
                raise Refused(Reason.WEIGHT_COMPUTED, f"the bias of {op.label} is computed, not stored")
            if take.side == "output" or vector.has_shift:
                self._require_own("bias", take)
            bias = self._asked.sharing.handle(op, "bias")
        elif vector.has_shift or self._bias_name(op) in self._before.created_bias:
            self._require_bias_slot(take)
            bias = self._bias_name(op)
            self._asked.created_bias[bias] = None
        handle = self._asked.sharing.handle(op, "weight")
        groups = op.attrs.get("groups", 1)
        edit = Edit(kind, _owner(handle), vector.expr, handle, bias, layout_of(op), groups)
        self._require_range(edit, take)
        return edit

    def _summand_edit(self, take: Take) -> Edit:
        """The constant that a sum adds takes the map in as it is."""
        handle = take.handle
        edit = Edit("scale_output", _owner(handle), take.vector.expr, handle, layout="summand")
        if self.graph.tensors[handle].dtype == torch.float16:
            after = take.vector.scale * self.half(handle).cpu() + take.vector.shift
            self._require_half({handle: after}, take.op)
        return edit

    def _bias_name(self, op: Op) -> str:
        return _bias_beside(self._asked.sharing.handle(op, "weight"))

    def _require_bias_slot(self, take: Take) -> None:
        """A bias may be created only where the call that reads the weight will read it too."""
        op, sharing = take.op, self._asked.sharing
        module, owner = self.graph.modules.get(op.scope), _owner(sharing.handle(op, "weight"))
        if module is not None and module.plain_bias:
            same = owner == op.scope and not sharing.is_apart(op.scope)
            if self.graph.rewirable or same or owner == (op.place or op.scope):
                return
            if self._unshare:
                self._give_own("weight", take)
                return
        if len(sharing.readers(op, "weight")) > 1:
            handle = sharing.handle(op, "weight")
            raise Refused(Reason.WEIGHT_SHARED, f"{handle} is shared, and {op.label} has no bias")
        raise Refused(Reason.CUSTOM_FORWARD, f"{op.label} has no bias, and its own forward may not use one")

    def _norm_edit(self, take: Take, kind: _Side) -> Edit:
        """A BatchNorm that stays takes the map in: to its affine it is a depthwise 1×1 convolution."""
        norm, label = self.norm_of[take.op.id], take.op.label
        if norm.unfit is not None:
            raise Refused(norm.unfit.reason, f"{label} cannot take it in: {norm.unfit.detail}")
        if "map" in take.op.attrs:
            raise Refused(Reason.CUSTOM_FORWARD, f"{label} computes its numbers in a forward of its own")
        if len(norm.ops) != 1:
            raise Refused(Reason.CALLED_MORE_THAN_ONCE, f"{label} runs {len(norm.ops)} times")
        gamma, beta = (self._own_or_new(role, norm, take) for role in ("weight", "bias"))
        return Edit(kind, norm.name, take.vector.expr, gamma, beta, "norm")

    def _own_or_new(self, role: str, norm: Norm, take: Take) -> str:
        """The handle of γ or β; of one to be made, where a BatchNorm without it stays and takes a map in."""
        if role not in take.op.inputs:
            made = f"{norm.name}.{role}".lstrip(".")
            if made in self.graph.tensors:
                raise Refused(Reason.CUSTOM_FORWARD, f"{take.op.label} does not use {made}, which there is")
            return made
        self._require_own(role, take)
        return self.graph.input(take.op, role).handle

    # -- sharing ----------------------------------------------------------------------------------------

    def _require_own(self, role: str, take: Take) -> None:
        """Every call that reads the tensor must ask for the same change, or be parted from it."""
        op, sharing = take.op, self._asked.sharing
        if (take.side, (op.id, role)) in self._own:
            return
        readers, agreed = sharing.readers(op, role), self._agreed(role, take)
        others = [self.graph.ops[edge[0]] for edge in readers if edge not in agreed]
        idle = sharing.idle(op, role)
        if not others and not idle:
            # what holds for this reading holds for all that agree with it
            self._own.update((take.side, edge) for edge in agreed)
            return
        if self._unshare and op.kind != "batch_norm":
            self._give_own(role, take)
            return
        handle = sharing.handle(op, role)
        if not others:
            raise Refused(Reason.WEIGHT_SHARED, f"{idle} is {handle}, and did not run")
        if others[0].scope == op.scope:
            often = f"{op.label} runs {len(readers)} times"
            raise Refused(Reason.CALLED_MORE_THAN_ONCE, f"{often}, not always with this BatchNorm")
        raise Refused(Reason.WEIGHT_SHARED, f"{others[0].label} shares {handle}")

    def _agreed(self, role: str, take: Take) -> set[Edge]:
        """The readings by layers that one edit serves: they ask for the same, and read alike."""
        agreed = {(take.op.id, role)}
        for edge in self._asked.sharing.readers(take.op, role):
            other = self._takes.get((take.side, edge[0])) if edge[1] == role else None
            if (
                other is not None
                and self._reading(other.op) == self._reading(take.op)
                and other.vector.equals(take.vector)
            ):
                agreed.add(edge)
        return agreed

    def _reading(self, op: Op) -> tuple[Any, ...]:
        """What two calls must have in common to share an edit: tensors, layout, groups.

        The settings of a call in a graph (the factors of a Gemm) belong to its layer.
        """
        sharing = self._asked.sharing
        layer = op.scope if self.graph.rewirable else ""
        settings = layout_of(op), op.attrs.get("groups", 1), layer
        return sharing.handle(op, "weight"), sharing.handle(op, "bias"), *settings

    def _give_own(self, role: str, take: Take) -> None:
        """Clone a tensor for this call site, with all that the plan has done to it."""
        op, sharing = take.op, self._asked.sharing
        readers, before = sharing.readers(op, role), sharing.handle(op, role)
        made = role == "weight" and self._bias_name(op) in self._before.created_bias
        slot = sharing.give_own(op, role, self._agreed(role, take))
        # where the clone took over the name, the others now go by another
        names = {slot, *(sharing.handle(self.graph.ops[edge[0]], edge[1]) for edge in readers)}
        for state in (self._before, self._asked):
            if before in state.halves:
                state.halves.update(dict.fromkeys(names, state.halves[before]))
            if made:
                state.created_bias.update(dict.fromkeys(map(_bias_beside, names)))
        tensor = self.graph.tensors[self.graph.input(op, role).handle]
        place = _owner(slot)
        clone = self._clones.get(place, Edit("unshare", place))
        sizes = {role: tensor.numel()}
        if made:
            shape = self.graph.output(op).shape
            sizes["bias"] = shape[channel_axis(op, len(shape))]
        self._clones[place] = dataclasses.replace(
            clone,
            weight=slot if role == "weight" else clone.weight,
            bias=_bias_beside(slot) if made else slot if role == "bias" else clone.bias,
            parameters=clone.parameters + sum(sizes.values()),
            bytes=clone.bytes + sum(sizes.values()) * tensor.element_size(),
        )

    # -- range ------------------------------------------------------------------------------------------

    def _require_range(self, edit: Edit, take: Take) -> None:
        """Refuse a folded weight or bias that its own type cannot hold (float16 ends at 65,504)."""
        stored = self.graph.tensors[self.graph.input(take.op, "weight").handle]
        if stored.dtype != torch.float16:
            return
        scale, shift = take.vector.scale.to(stored.device), take.vector.shift.to(stored.device)
        weight = self._half(edit.weight, self.graph.input(take.op, "weight").handle)
        after = {edit.weight: weight * rows(edit.layout, weight, edit.groups, scale, take.side)}
        if edit.bias:
            held = self.graph.input(take.op, "bias").handle if "bias" in take.op.inputs else ""
            bias = self._half(edit.bias, held).to(stored.device)
            if take.side == "output":
                after[edit.bias] = scale * bias + shift
            else:
                after[edit.bias] = bias + bias_from_input_shift(edit.layout, weight, edit.groups, shift)
        self._require_half(after, take.op)

    def _require_half(self, after: dict[str, Tensor], op: Op) -> None:
        peak = max(float(t.abs().max()) for t in after.values() if t.numel())
        limit = torch.finfo(torch.float16).max
        if peak > limit:
            raise Refused(
                Reason.OVERFLOW, f"the folded weight of {op.label} reaches {peak:.3g}, beyond {limit:g}"
            )
        self._asked.halves.update(after)

    def half(self, handle: str) -> Tensor:
        """A float16 tensor as the folds so far have left it, in float64; zero where there is none."""
        return self._half(handle, handle)

    def _half(self, handle: str, held: str) -> Tensor:
        """The same for a call that reads `handle` now, and read `held` before any was unshared."""
        stored = self.graph.tensors.get(held, torch.zeros(()))
        return self._before.halves.get(handle, stored.detach().double())

    def made_bias(self, layer: str) -> str:
        """The handle of the bias that a fold makes for a layer; empty where none does."""
        handle = f"{layer}.bias".lstrip(".")
        return handle if handle in self._settled.created_bias else ""


def _owner(handle: str) -> str:
    return handle.rpartition(".")[0]


def _bias_beside(weight: str) -> str:
    return f"{_owner(weight)}.bias".lstrip(".")
