"""Apply a fold plan to an ONNX model in memory: new numbers for the layers, and the BatchNorms rewired."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from bntool.affine import Pair, batch_norm_affine, evaluate
from bntool.observe.onnx_layers import PRODUCTS, Call, Norm
from bntool.observe.onnx_model import OnnxObservation
from bntool.plan import Edit, Merge, Plan, Window
from bntool.surgery.merging import merged
from bntool.surgery.onnx_wiring import Place, Wiring
from bntool.surgery.tensors import edited, edited_norm


@dataclasses.dataclass(frozen=True)
class OnnxCounts:
    """Nodes and stored numbers (elements of all initializers) before and after."""

    nodes_before: int
    nodes_after: int
    numbers_before: int
    numbers_after: int


def apply_fold_onnx(observed: OnnxObservation, plan: Plan) -> OnnxCounts:
    """Carry a fold plan out on the observed model itself.

    Arithmetic is float64 with one cast to the stored type. A tensor that only the layer reads is replaced
    under its name; one that others read too stays, and the layer gets its own: `NAME_unshared` where the plan
    clones it, else `NAME_folded`. Nothing else changes.
    """
    before = _count(observed.model)
    with torch.no_grad():
        work = _FoldWork(observed)
        edits = [edit for site in plan.fold_sites for edit in site.edits]
        work.carry_out(edits, plan.merges)
    after = _count(observed.model)
    return OnnxCounts(before[0], after[0], before[1], after[1])


def _count(model: ir.Model) -> tuple[int, int]:
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(1 for _ in model.graph), sum(t.size for t in tensors if t is not None)


@dataclasses.dataclass
class _Group:
    """Calls that still share their tensors, and what the plan asks of these."""

    calls: list[Call]
    changes: list[tuple[Edit, Pair]] = dataclasses.field(default_factory=list)


class _FoldWork:
    def __init__(self, observed: OnnxObservation) -> None:
        self.graph, self.norms = observed.graph, observed.norms
        groups = [_Group(list(layer.calls)) for layer in observed.layers.values()]
        self.groups = {call.label: group for group in groups for call in group.calls}
        self.ops = {op.place: op for op in self.graph.ops if op.place}
        self.eps = {op.scope: float(op.attrs["eps"]) for op in self.graph.of_kind("batch_norm")}
        self.wiring = Wiring(observed.model)
        self.norm_tensors: dict[str, Tensor] = {}
        self.removed: list[str] = []
        self.held: dict[str, Tensor] = {}

    def carry_out(self, edits: Iterable[Edit], merges: Sequence[Merge]) -> None:
        merging = {branch.layer for merge in merges for branch in merge.branches}
        values = {str(v.name): v for node in self.wiring.graph for v in node.outputs} if merges else {}
        for edit in edits:
            if edit.kind == "remove":
                self.removed.append(edit.layer)
                continue
            if edit.kind == "unshare":
                self._unshare(edit)
                continue
            assert edit.map is not None
            pair = evaluate(edit.map, self._leaf)
            if edit.layout == "norm":
                self._edit_norm(edit, pair)
            else:
                self.groups[edit.layer].changes.append((edit, pair))
        for group in {id(group): group for group in self.groups.values()}.values():
            if not group.changes:
                continue
            weight, bias = self._edited(group)
            if (name := group.calls[0].label) in merging:
                self.held[f"{name}.weight"] = weight
                if bias is not None:
                    self.held[f"{name}.bias"] = bias
            else:
                self._write_layer(group, weight, bias)
        going = {*self.removed, *(name for merge in merges for name in merge.norms)}
        for name in {handle.rpartition(".")[0] for handle in self.norm_tensors} - going:
            self._write_norm(self.norms[name])
        for name in self.removed:
            for nodes, data in self.norms[name].calls:
                self.wiring.take_out(nodes, data)
        for merge in merges:
            self._merge(merge, values[merge.values[-1]])
        self.wiring.drop_unused()

    # -- numbers ----------------------------------------------------------------------------------------

    def _leaf(self, kind: str, name: str) -> Any:
        if kind == "tensor":
            return self.graph.tensors[name]
        gamma, beta = (self._norm_tensor(f"{name}.{slot}") for slot in ("weight", "bias"))
        return batch_norm_affine(gamma, beta, *self._statistics(name), self.eps[name])

    def _norm_tensor(self, handle: str) -> Tensor:
        """γ or β as the edits so far have left it, in float64."""
        return self.norm_tensors.get(handle, self.graph.tensors[handle].double())

    def _statistics(self, name: str) -> tuple[Tensor, Tensor]:
        tensors = self.graph.tensors
        return tensors[f"{name}.running_mean"].double(), tensors[f"{name}.running_var"].double()

    def _edit_norm(self, edit: Edit, pair: Pair) -> None:
        gamma, beta = self._norm_tensor(edit.weight), self._norm_tensor(edit.bias)
        mean, variance = self._statistics(edit.layer)
        self.norm_tensors[edit.weight], self.norm_tensors[edit.bias] = edited_norm(
            edit, gamma, beta, mean, variance, self.eps[edit.layer], pair
        )

    # -- sharing ----------------------------------------------------------------------------------------

    def _unshare(self, edit: Edit) -> None:
        """One call leaves the others of its layer, with clones of the tensors that it shares."""
        group = self.groups[edit.layer]
        call = next(call for call in group.calls if call.label == edit.layer)
        if len(group.calls) > 1:
            group.calls.remove(call)
            self.groups[edit.layer] = _Group([call], list(group.changes))
        if edit.weight:
            self._clone(call.weight, (call.node, call.weight_index), self._stored(call, "weight"))
        if edit.bias and call.bias is not None:
            shaped = _shaped_like(self._stored(call, "bias"), call.bias)
            self._clone(call.bias, call.bias_place, shaped)

    def _clone(self, old: ir.Value, place: Place, tensor: Tensor) -> None:
        node, index = place
        node.replace_input_with(index, self.wiring.new_initializer(f"{old.name}_unshared", tensor))

    def _stored(self, call: Call, role: str) -> Tensor:
        return self.graph.tensors[self.graph.input(self.ops[call.label], role).handle]

    # -- writing ----------------------------------------------------------------------------------------

    def _edited(self, group: _Group) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after all edits of one layer, in float64; no bias where it stays as it is."""
        first = group.calls[0]
        stored_weight = self._stored(first, "weight")
        stored_bias = None if first.bias is None else self._stored(first, "bias")
        weight = stored_weight.double()
        bias = None if stored_bias is None else stored_bias.double()
        alpha, beta = (_factor(first.node, n) for n in ("alpha", "beta"))
        if first.node.op_type == "Gemm":
            # Both factors go into the numbers, so that the edit means what it says.
            weight = weight * alpha
            bias = bias if bias is None else bias * beta
            for call in group.calls:
                call.node.attributes.pop("alpha", None)
                call.node.attributes.pop("beta", None)
        before = bias if beta == 1 else None
        for edit, pair in group.changes:
            weight, bias = edited(edit, weight, bias, pair)
        return weight, None if bias is before else bias

    def _write_layer(self, group: _Group, weight: Tensor, bias: Tensor | None) -> None:
        """New numbers for a layer, in one cast to the type of the old ones."""
        first = group.calls[0]
        stored_weight = self._stored(first, "weight")
        stored_bias = None if first.bias is None else self._stored(first, "bias")
        self.wiring.store(
            first.weight, [(c.node, c.weight_index) for c in group.calls], weight.to(stored_weight.dtype)
        )
        if bias is not None:
            kept = stored_weight.dtype if stored_bias is None else stored_bias.dtype
            self._write_bias(group.calls, bias.to(kept))

    def _write_bias(self, calls: list[Call], bias: Tensor) -> None:
        """A bias where the old one stood, or a new one: the third input, or an Add behind a product."""
        old, weight = calls[0].bias, calls[0].weight
        if old is not None:
            self.wiring.store(old, [call.bias_place for call in calls], _shaped_like(bias, old))
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
        group = self.groups[merge.layer]
        self._write_layer(group, *merged(merge, self._tensor, self._leaf))
        (call,) = group.calls
        if any(b.weight == merge.weight and b.window != merge.window for b in merge.branches):
            _set_window(call.node, merge.window)
        self.wiring.put_instead(call.output, output)

    def _tensor(self, handle: str) -> Tensor | None:
        """A layer's tensor as its edits have left it, before it is rounded."""
        return self.held.get(handle, self.graph.tensors.get(handle))

    def _write_norm(self, norm: Norm) -> None:
        """γ and β of a BatchNorm that stays; one that was taken apart becomes a Mul and an Add."""
        gamma, beta = (self.norm_tensors[f"{norm.name}.{slot}"] for slot in ("weight", "bias"))
        op = next(op for op in self.graph.of_kind("batch_norm") if op.scope == norm.name)
        if norm.axis is not None:
            data = self.graph.input(op)
            shape = [1] * len(data.shape)
            shape[norm.axis] = -1
            dtype = getattr(torch, data.dtype.removeprefix("torch."))
            parts = (part.to(dtype).reshape(shape) for part in (gamma, beta))
            self.wiring.rewrite_as_mul_add(*norm.calls[0], *parts)
            return
        for index, slot, tensor in ((1, "weight", gamma), (2, "bias", beta)):
            places = [(nodes[0], index) for nodes, _ in norm.calls]
            old = places[0][0].inputs[index]
            assert old is not None
            kept = self.graph.tensors[f"{norm.name}.{slot}"].dtype
            self.wiring.store(old, places, tensor.to(kept))


def _set_window(node: ir.Node, window: Window) -> None:
    node.attributes.pop("auto_pad", None)
    for name, numbers in (
        ("kernel_shape", window.kernel),
        ("dilations", window.dilation),
        ("pads", (*window.before, *window.after)),
    ):
        node.attributes[name] = ir.AttrInt64s(name, numbers)
    node.attributes["group"] = ir.AttrInt64("group", window.groups)


def _shaped_like(bias: Tensor, old: ir.Value) -> Tensor:
    """As many axes of one as the old bias had; a single number that stood for all becomes a vector."""
    rank = 1
    if old.const_value is not None:
        rank = max(1, len(old.const_value.shape))
    elif old.shape is not None:
        rank = max(1, len(old.shape))
    return bias.reshape((1,) * (rank - 1) + tuple(bias.shape))


def _factor(node: ir.Node, name: str) -> float:
    found = node.attributes.get_float(name, 1.0)
    return 1.0 if found is None else float(found)


def _bias_name(weight: str) -> str:
    stem = weight.removesuffix("weight")
    return f"{stem}bias" if stem != weight else f"{weight}_bias"
