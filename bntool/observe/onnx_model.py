"""Observe an ONNX model: its main graph as a neutral dataflow graph, without running it."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir
import torch
from torch import Tensor

from bntool.graph import Graph, Module, Op
from bntool.observe.onnx_constants import Constants
from bntool.observe.onnx_layers import LINEAR_OPS, Call, Chain, Layer, Norm, bias_add, chain_behind
from bntool.observe.onnx_ops import SHAPE_READERS, NodeView, Step, translate
from bntool.observe.onnx_shapes import Shapes, infer

_MAX_OPERAND = 1 << 16
"""Constants of more elements are no factor per channel; their numbers are not read."""
_NORM_ROLES = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass
class OnnxObservation:
    """The graph, and what its names stand for in the model: layers, BatchNorms, and the ones out of reach.

    `open` tells whether some axis has no fixed size, so that sizes were made up. `hidden` names every
    BatchNorm inside a body or a function, with where it stands.
    """

    graph: Graph
    model: ir.Model
    layers: dict[str, Layer]
    norms: dict[str, Norm]
    hidden: list[tuple[str, str]]
    open: bool
    constants: Constants


def observe_onnx(model: ir.Model, sizes: int = 0) -> OnnxObservation:
    """The dataflow graph of an ONNX model; nothing is run and nothing changed.

    An axis without a fixed size gets one, from the first (0) or the second (1) set of sizes; a plan that
    holds for the model is the same with both. Bodies of If, Loop and Scan, and functions, are one op each.
    """
    return _Reader(model, sizes).read()


class _Reader:
    def __init__(self, model: ir.Model, sizes: int) -> None:
        self.model = model
        self.graph = Graph()
        self.graph.model_class = f"ONNX graph {model.graph.name or ''}".rstrip()
        self.constants = Constants(model)
        self.shapes: Shapes = infer(model, sizes)
        self.values: dict[int, int] = {}
        self.labels = _labels(model)
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, Norm] = {}
        self.layer_of: dict[tuple[object, ...], str] = {}
        self.layers_reading: dict[int, set[str]] = {}
        self.norm_of: dict[tuple[object, ...], str] = {}
        self.fused: dict[ir.Node, ir.Node] = {}
        self.chains: dict[ir.Node, tuple[ir.Value, Chain, int]] = {}
        self.swallowed: set[ir.Node] = set()

    def read(self) -> OnnxObservation:
        for value in self.model.graph.inputs:
            self._value(value)
        for node in self.model.graph:
            if node in self.chains:
                self._chain(node)
            elif node in self.fused:
                self._linear(Call(self.fused[node], node))
            elif node not in self.swallowed and not self._is_constant(node):
                self._node(node)
        self._block_weights_of_several_layers()
        for value in self.model.graph.outputs:
            if id(value) in self.values:
                self.graph.values[self.values[id(value)]].is_output = True
        return OnnxObservation(
            self.graph, self.model, self.layers, self.norms, _hidden(self.model), self.shapes.open, self.constants
        )

    def _is_constant(self, node: ir.Node) -> bool:
        return all(v in self.constants for v in node.outputs if v.name)

    # -- values -----------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return None if value is None else self.shapes.sizes.get(str(value.name))

    def _value(self, value: ir.Value) -> int:
        """The neutral value of an ONNX value; a constant keeps its numbers where a law may want them."""
        if id(value) in self.values:
            return self.values[id(value)]
        dtype = self.shapes.dtypes.get(str(value.name), "")
        constant = value in self.constants
        made = self.graph.add_value(self.shape(value) or (), constant=constant, dtype=dtype)
        self.values[id(value)] = made.id
        if constant and _size(made.shape) <= _MAX_OPERAND and not self.constants.is_dequantized(value):
            tensor = self.constants.tensor(value)
            if tensor is not None:
                self.graph.constants[made.id] = tensor
        return made.id

    def _stored(self, handle: str, tensor: Tensor) -> int:
        """A value of its own for a tensor that a fold may change."""
        self.graph.tensors[handle] = tensor
        return self.graph.add_value(tuple(tensor.shape), handle=handle, constant=True, dtype=str(tensor.dtype)).id

    # -- ops --------------------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        if node.domain in ("", "ai.onnx"):
            if node.op_type == "BatchNormalization":
                self._norm(node)
                return
            if node.op_type in LINEAR_OPS and self._is_layer(node):
                self._linear(Call(node))
                return
        view = NodeView(node, self.constants, self.shape)
        steps = translate(view) if self._is_known(node) else None
        if steps is None:
            self._opaque(node)
            return
        reads = {_role(i): self._value(v) for i in steps.reads if (v := view.input(i)) is not None}
        if steps.steps[-1].kind == "concat":
            reads = {f"input_{i}": value for i, value in enumerate(reads.values())}
        for step in steps.steps[:-1]:
            reads = {"input": self._step(step, reads)}
        outputs = tuple(self._value(v) for v in node.outputs if v.name)
        last = steps.steps[-1]
        self.graph.add_op(last.kind, reads, outputs, attrs=last.attrs)

    def _step(self, step: Step, reads: dict[str, int]) -> int:
        """One of several ops that a node stands for; its result has no name in the file."""
        source = self.graph.values[reads["input"]]
        made = self.graph.add_value(step.shape, dtype=source.dtype)
        self.graph.add_op(step.kind, reads, (made.id,), attrs=step.attrs)
        return made.id

    def _is_known(self, node: ir.Node) -> bool:
        """Laws compare shapes, so every value they see must have one."""
        data = node.outputs if node.op_type in SHAPE_READERS else (node.inputs[0] if node.inputs else None, *node.outputs)
        return all(v is None or not v.name or self.shape(v) is not None for v in data)

    def _opaque(self, node: ir.Node) -> None:
        """An op that no law covers: whatever it reads, also inside its bodies, must not change."""
        reads: dict[str, int] = {}
        if node.op_type not in SHAPE_READERS:
            for value in (*node.inputs, *_captured(node)):
                if value is not None and self.values.get(id(value)) not in reads.values():
                    reads[_role(len(reads))] = self._value(value)
        outputs = tuple(self._value(v) for v in node.outputs if v.name)
        self.graph.add_op(node.op_type.lower(), reads, outputs, attrs={}, scope=self.labels[node])

    # -- linear layers ----------------------------------------------------------------------------------

    def _is_layer(self, node: ir.Node) -> bool:
        """Whether the node computes W·x (+ b) with x from the left, and its shapes are known."""
        source, weight = node.inputs[0], node.inputs[1]
        if weight is None or self.shape(weight) is None or self.shape(source) is None:
            return False
        if source in self.constants or self.shape(node.outputs[0]) is None:
            return False
        if node.op_type == "MatMul":
            return weight in self.constants and len(self.shape(weight) or ()) == 2
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            shape, features = self.shape(bias), (self.shape(node.outputs[0]) or ())[-1]
            return bias is None or (shape is not None and _size(shape) in (1, features) and shape[:1] in ((), (1,), (features,)) and (len(shape) < 2 or shape[0] == 1))
        return True

    def _linear(self, call: Call) -> None:
        node = call.node
        if node.op_type == "MatMul" and call.add is None and self._takes_an_add(call):
            return
        name = self._layer(call)
        view = NodeView(node, self.constants, self.shape)
        source = node.inputs[0]
        assert source is not None
        data = self._value(source)
        kind, attrs = _linear_kind(view)
        if node.op_type == "Gemm" and view.attr("transA", 0):
            rows, columns = self.graph.values[data].shape
            data = self._step(Step("permute", {"dims": (1, 0)}, (columns, rows)), {"input": data})
        inputs = {"input": data, "weight": self._weight(call, name)}
        if call.bias is not None:
            inputs["bias"] = self._bias(call, name)
        self.graph.add_op(kind, inputs, (self._value(call.output),), attrs=attrs, scope=name)
        self._look_for_chain(call.output, kind, attrs)

    def _takes_an_add(self, call: Call) -> bool:
        """A bias behind a MatMul belongs to it; the two are read where the Add stands."""
        shape = self.shape(call.output) or ()
        add = bias_add(call.node, self.constants, shape[-1]) if shape else None
        if add is None or self.shape(add.outputs[0]) != shape:
            return False
        self.fused[add] = call.node
        return True

    def _layer(self, call: Call) -> str:
        key = call.alike()
        name = self.layer_of.setdefault(key, self.labels[call.node])
        layer = self.layers.setdefault(name, Layer(name, []))
        layer.calls.append(call)
        role = "conv" if call.node.op_type.startswith("Conv") else "linear"
        module = self.graph.modules.setdefault(name, Module(name, call.node.op_type, role=role, plain_bias=True))
        module.calls += 1
        return name

    def _weight(self, call: Call, name: str) -> int:
        weight = call.weight
        self.layers_reading.setdefault(id(weight), set()).add(name)
        known = self.values.get(id(weight))
        if known is not None and (self.graph.values[known].handle or weight not in self.constants):
            return known
        tensor = self.constants.tensor(weight) if weight in self.constants else None
        if tensor is None:
            return self._value(weight)
        made = self._stored(f"{name}.weight", tensor)
        if known is None:
            self.values[id(weight)] = made
        else:
            # Somebody else reads it too; a reader of the stored value says so to the planner.
            self.graph.add_op("shared", {"input": made}, (), attrs={})
        return made

    def _bias(self, call: Call, name: str) -> int:
        """Biases are short: each layer has its own, also where the file keeps one for several."""
        bias = call.bias
        handle = f"{name}.bias"
        known = next((v.id for v in self.graph.values if False), None)
        assert bias is not None
        tensor = self.constants.tensor(bias)
        if tensor is None:
            return self._value(bias)
        first = self.layers[name].calls[0]
        if first is not call and handle in self.graph.tensors:
            return next(v.id for v in self.graph.values if v.handle == handle)
        del known
        features = (self.shape(call.output) or ())[-1] if call.node.op_type in ("Gemm", "MatMul") else tensor.numel()
        return self._stored(handle, tensor.reshape(-1).expand(features))

    def _block_weights_of_several_layers(self) -> None:
        """Layers that read one weight in different ways cannot share its edit."""
        for weight, layers in self.layers_reading.items():
            if len(layers) > 1:
                self.graph.add_op("shared", {"input": self.values[weight]}, (), attrs={})

    # -- BatchNorms -------------------------------------------------------------------------------------

    def _norm(self, node: ir.Node) -> None:
        view = NodeView(node, self.constants, self.shape)
        source = node.inputs[0]
        assert source is not None
        data = self._value(source)
        name = self._norm_name(node)
        spatial = bool(view.attr("spatial", 1))
        module = self.graph.modules.setdefault(
            name, Module(name, "BatchNormalization", role="norm" if spatial else "custom_norm")
        )
        module.calls += 1
        norm = self.norms.setdefault(name, Norm(name, []))
        inputs = {"input": data}
        for role, value in zip(_NORM_ROLES, node.inputs[1:], strict=False):
            tensor = self.constants.tensor(value)
            handle = f"{name}.{role}"
            assert value is not None
            if tensor is None:
                inputs[role] = self._value(value)
            elif norm.calls:
                inputs[role] = self.graph.ops[self._first_call(name)].inputs[role]
            else:
                inputs[role] = self._stored(handle, tensor)
        norm.calls.append((source, [node]))
        attrs = {"eps": float(view.attr("epsilon", 1e-5)), "training": _trains(view), "axis": 1}
        outputs = tuple(self._value(v) for v in node.outputs if v.name)
        if self.shape(source) is None or len(self.shape(source) or ()) < 2:
            module.role = "custom_norm"
        self.graph.add_op("batch_norm", inputs, outputs, attrs=attrs, scope=name)

    def _first_call(self, name: str) -> int:
        return next(op.id for op in self.graph.ops if op.scope == name)

    def _norm_name(self, node: ir.Node) -> str:
        """Calls of one BatchNorm on the results of one layer are one BatchNorm; every other is its own."""
        label = self.labels[node]
        source = self.graph.producer(self.graph.values[self._value(node.inputs[0])])  # type: ignore[arg-type]
        layer = self.layers.get(source.scope) if source is not None else None
        if source is None or layer is None or source.scope not in self.layers:
            return label
        settings = tuple(str(a.value) for _, a in sorted(node.attributes.items()))
        key = (source.scope, settings, *(id(v) for v in node.inputs[1:]))
        return self.norm_of.setdefault(key, label)

    def _look_for_chain(self, value: ir.Value, kind: str, attrs: dict[str, object]) -> None:
        shape = self.shape(value)
        if shape is None:
            return
        axis = len(shape) - 1 if kind in ("linear", "matmul") else 1
        found = chain_behind(value, axis, shape, self.constants, lambda n: self.shape(n.outputs[0]) == shape)
        if found is not None:
            self.chains[found.nodes[-1]] = (value, found, axis)
            self.swallowed.update(found.nodes)
        del attrs

    def _chain(self, last: ir.Node) -> None:
        """A BatchNorm in elementary ops, as one op with statistics of 0 and 1."""
        source, chain, axis = self.chains[last]
        name = self.labels[chain.nodes[0]]
        self.norms[name] = Norm(name, [(source, chain.nodes)], (chain.scale, chain.shift, axis))
        self.graph.modules[name] = Module(name, "+".join(n.op_type for n in chain.nodes), role="norm", calls=1)
        one, zero = torch.ones_like(chain.scale), torch.zeros_like(chain.scale)
        inputs = {"input": self._value(source)}
        for role, tensor in zip(_NORM_ROLES, (chain.scale, chain.shift, zero, one), strict=True):
            inputs[role] = self._stored(f"{name}.{role}", tensor)
        attrs = {"eps": 0.0, "training": False, "axis": axis}
        self.graph.add_op("batch_norm", inputs, (self._value(last.outputs[0]),), attrs=attrs, scope=name)
