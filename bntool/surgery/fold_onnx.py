"""Apply a fold plan to an ONNX model in memory: new numbers for the layers, and the BatchNorms rewired."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from bntool.core.plan import Plan
from bntool.core.sites import Branch, Edit, Merge, Window
from bntool.observe.onnx_layers import PRODUCTS, Call, Norm
from bntool.observe.onnx_model import OnnxObservation
from bntool.observe.onnx_values import OWN
from bntool.surgery.editing import ROLES, Role, Slot, StoredNorm, apply_edits, removed_norms
from bntool.surgery.onnx_wiring import Place, Wiring

_FACTORS = {"weight": "alpha", "bias": "beta"}
"""What a Gemm multiplies its matrix and its bias by."""


def apply_fold_onnx(observed: OnnxObservation, plan: Plan) -> None:
    """Carry a fold plan out on the observed model itself.

    Arithmetic is float64 with one cast to the stored type. A tensor that only the layer reads is replaced
    under its name; one that others read too stays, and the layer gets its own: `NAME_unshared` where the plan
    clones it, else `NAME_folded`. Nothing else changes.
    """
    tensors = _OnnxTensors(observed)
    # by name as they are now: rewiring gives names to others
    nodes = observed.model.graph.all_nodes() if plan.merges else ()
    values = {str(v.name): v for node in nodes for v in node.outputs}
    apply_edits(tensors, plan)
    tensors.rewire(plan, values)


@dataclasses.dataclass(eq=False)
class _Group:
    """Calls that still share their tensors."""

    calls: list[Call]


class _OnnxTensors:
    """The tensors of a model, told by the group of calls that read them, or by their handles for a BatchNorm.

    The factors of a Gemm go into the numbers that are edited, so that an edit means what it says.
    """

    def __init__(self, observed: OnnxObservation) -> None:
        self.graph, self.norms = observed.graph, observed.norms
        groups = [_Group(list(layer.calls)) for layer in observed.layers.values()]
        self.groups = {call.label: group for group in groups for call in group.calls}
        self.ops = {op.place: op for op in self.graph.ops if op.place}
        self.eps = {op.scope: float(op.attrs["eps"]) for op in self.graph.of_kind("batch_norm")}
        self.wiring = Wiring(observed.model)
        self.new_affine: dict[str, Tensor] = {}
        self.initializers = observed.model.graph.initializers

    def slot(self, part: Edit | Branch | Merge, role: Role) -> Slot:
        if isinstance(part, Edit) and part.layout == "summand":
            return part.weight
        return self.groups[part.layer], role

    def norm(self, name: str) -> StoredNorm:
        mean, variance = (self.constant(f"{name}.{slot}") for slot in ("running_mean", "running_var"))
        return StoredNorm(f"{name}.weight", f"{name}.bias", mean, variance, self.eps[name])

    def constant(self, handle: str) -> Tensor:
        return self.graph.tensors[handle]

    def stored(self, slot: Slot) -> Tensor | None:
        if isinstance(slot, str):
            return self.constant(slot)
        (call, *_), role = _calls_of(slot)
        if role == "bias" and call.bias is None:
            return None
        tensor, factor = self._held(call, role), _factor(call.node, role)
        return tensor if factor == 1 else tensor.double() * factor

    def like(self, slot: Slot) -> Tensor:
        if isinstance(slot, str):
            return self.constant(slot)
        (call, *_), role = _calls_of(slot)
        return self._held(call, "weight" if call.bias is None else role)

    def put(self, slot: Slot, tensor: Tensor) -> None:
        if isinstance(slot, str):
            if slot.endswith(OWN):
                own = self.initializers[slot.removesuffix(OWN)]
                self.wiring.store(own, [(use.node, use.idx) for use in own.uses()], tensor)
            else:
                self.new_affine[slot] = tensor
            return
        calls, role = _calls_of(slot)
        for call in calls:
            call.node.attributes.pop(_FACTORS[role], None)
        if role == "bias":
            self._put_bias(calls, tensor)
        else:
            self.wiring.store(calls[0].weight, [(c.node, c.weight_index) for c in calls], tensor)

    def unshare(self, edit: Edit) -> Iterator[tuple[Slot, Slot]]:
        """One call leaves the others of its layer, with clones of the tensors that it shares."""
        group = self.groups[edit.layer]
        call = next(call for call in group.calls if call.label == edit.layer)
        if len(group.calls) > 1:
            group.calls.remove(call)
            own = self.groups[edit.layer] = _Group([call])
            yield from (((group, role), (own, role)) for role in ROLES)
        if edit.weight:
            self._clone(call.weight, (call.node, call.weight_index), self._held(call, "weight"))
        if edit.bias and call.bias is not None:
            self._clone(call.bias, call.bias_place, _shaped_like(self._held(call, "bias"), call))

    def rewire(self, plan: Plan, values: Mapping[str, ir.Value]) -> None:
        """Take out the BatchNorms that go, and the branches that are merged, with what only they read."""
        for name in dict.fromkeys(handle.rpartition(".")[0] for handle in self.new_affine):
            self._write_norm(self.norms[name])
        for name in removed_norms(plan):
            for nodes, data in self.norms[name].calls:
                self.wiring.take_out(nodes, data)
        for merge in plan.merges:
            self._merge(merge, values[merge.values[-1]])
        self.wiring.drop_unused()

    def _clone(self, old: ir.Value, place: Place, tensor: Tensor) -> None:
        node, index = place
        node.replace_input_with(index, self.wiring.new_initializer(f"{old.name}_unshared", tensor))

    def _held(self, call: Call, role: str) -> Tensor:
        return self.graph.tensors[self.graph.input(self.ops[call.label], role).handle]

    def _put_bias(self, calls: list[Call], bias: Tensor) -> None:
        """A bias where the old one stood, or a new one: the third input, or an Add behind a product."""
        old, weight = calls[0].bias, calls[0].weight
        if old is not None:
            self.wiring.store(old, [call.bias_place for call in calls], _shaped_like(bias, calls[0]))
            return
        column = bias.reshape(-1, *[1] * calls[0].behind)
        value = self.wiring.new_initializer(_bias_name(str(weight.name)), column)
        for call in calls:
            if call.node.op_type in PRODUCTS:
                self.wiring.add_behind(call.node, value)
            else:
                call.node.resize_inputs(3)
                call.node.replace_input_with(2, value)

    def _merge(self, merge: Merge, output: ir.Value) -> None:
        """One convolution in the place of parallel branches; what then nobody reads goes with the rest."""
        (call,) = self.groups[merge.layer].calls
        if any(b.weight == merge.weight and b.window != merge.window for b in merge.branches):
            _set_window(call.node, merge.window)
        self.wiring.put_instead(call.output, output)

    def _write_norm(self, norm: Norm) -> None:
        """γ and β of a BatchNorm that stays; one that was taken apart becomes a Mul and an Add."""
        gamma, beta = (self.new_affine[f"{norm.name}.{slot}"] for slot in ("weight", "bias"))
        op = next(op for op in self.graph.of_kind("batch_norm") if op.scope == norm.name)
        if norm.axis is not None:
            data = self.graph.input(op)
            shape = [1] * len(data.shape)
            shape[norm.axis] = -1
            dtype = getattr(torch, data.dtype.removeprefix("torch."))
            parts = (part.to(dtype).reshape(shape) for part in (gamma, beta))
            self.wiring.rewrite_as_mul_add(*norm.calls[0], *parts)
            return
        for index, tensor in ((1, gamma), (2, beta)):
            places = [(nodes[0], index) for nodes, _ in norm.calls]
            old = places[0][0].inputs[index]
            assert old is not None
            self.wiring.store(old, places, tensor)


def _set_window(node: ir.Node, window: Window) -> None:
    node.attributes.pop("auto_pad", None)
    for name, numbers in (
        ("kernel_shape", window.kernel),
        ("dilations", window.dilation),
        ("pads", (*window.before, *window.after)),
    ):
        node.attributes[name] = ir.AttrInt64s(name, numbers)
    node.attributes["group"] = ir.AttrInt64("group", window.groups)


def _shaped_like(bias: Tensor, call: Call) -> Tensor:
    """As many axes of one as the old bias had; a single number that stood for all becomes a vector."""
    old, behind = call.bias, call.behind if call.add is not None else 0
    stored = None if old is None else old.const_value or old
    shape = None if stored is None else stored.shape
    before = max(0 if shape is None else len(shape) - 1 - behind, 0)
    return bias.reshape((1,) * before + tuple(bias.shape) + (1,) * behind)


def _calls_of(slot: Slot) -> tuple[list[Call], Role]:
    """The calls that a slot belongs to, and its role there."""
    assert isinstance(slot, tuple)
    group, role = slot
    return group.calls, role


def _factor(node: ir.Node, role: Role) -> float:
    found = node.attributes.get_float(_FACTORS[role], 1.0) if node.op_type == "Gemm" else 1.0
    return 1.0 if found is None else float(found)


def _bias_name(weight: str) -> str:
    stem = weight.removesuffix("weight")
    return f"{stem}bias" if stem != weight else f"{weight}_bias"
