"""Observe an ONNX model: its graph, bodies included, as one neutral dataflow graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from bntool.graph.dataflow import Graph, Module, Op
from bntool.observe.decomposed_norms import norms_taken_apart, put_together
from bntool.observe.onnx_bodies import infer_bodies
from bntool.observe.onnx_constants import Constants
from bntool.observe.onnx_einsum import LinearEinsum, linear_einsum
from bntool.observe.onnx_layers import CONVOLUTIONS, LINEAR_OPS, PRODUCTS, Call, Layer, Norm, bias_add
from bntool.observe.onnx_nodes import bodies_of, handed_out, hidden_norms, is_standard, labels_of, opaque_kind
from bntool.observe.onnx_ops import translate
from bntool.observe.onnx_shapes import Seen, sizes_of
from bntool.observe.onnx_values import Values
from bntool.observe.onnx_view import NodeView, Step, batch_norm_attrs, is_linear, linear_step

_NORM_ROLES = ("weight", "bias", "running_mean", "running_var")
_SHAPE_READERS = frozenset({"Shape", "Size"})
"""Ops that read the shape of their input only: what it holds may change."""


@dataclasses.dataclass(frozen=True)
class OnnxObservation:
    """The graph, and what its names stand for in the model.

    `open` tells whether some axis has no fixed size, so that sizes were made up. `hidden` names every
    BatchNormalization inside a function that stays a call, and says where it stands.
    """

    graph: Graph
    model: ir.Model
    layers: Mapping[str, Layer]
    norms: Mapping[str, Norm]
    hidden: tuple[tuple[str, str], ...]
    open: bool


def observe_onnx(model: ir.Model, sizes: int = 0, seen: Seen | None = None) -> OnnxObservation:
    """The dataflow graph of an ONNX model; nothing is changed, and nothing run unless inference gives up.

    An axis without a fixed size gets one, from the first (0) or the second (1) set of sizes: a plan that
    is the same with both relies on neither. `seen` tells sizes from runs. The ops in a body of If,
    Loop or Scan stand before the op itself.
    """
    reader = _Reader(model, sizes, seen)
    reader.read()
    return OnnxObservation(
        reader.graph,
        model,
        reader.layers,
        reader.norms,
        tuple(hidden_norms(model)),
        reader.shapes.open,
    )


class _Reader:
    def __init__(self, model: ir.Model, sizes: int, seen: Seen | None) -> None:
        self.model = model
        self.graph = Graph()
        self.graph.model_class = f"ONNX graph {model.graph.name or ''}".rstrip()
        self.graph.rewirable = True
        self.shapes = sizes_of(model, sizes, seen)
        infer_bodies(model, self.shapes)
        self.constants = Constants(model, self.shapes)
        self.labels = labels_of(model)
        self.values = Values(self.graph, self.shapes, self.constants, model.graph)
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, Norm] = {}
        self.known_layers: dict[tuple[Any, ...], str] = {}
        self.known_norms: dict[tuple[Any, ...], str] = {}
        self.fused: dict[ir.Node, Call] = {}
        self.nodes: dict[int, ir.Node] = {}

    def read(self) -> None:
        self._graph(self.model.graph)
        self._put_norms_together()

    def _graph(self, graph: ir.Graph) -> None:
        """The ops of a graph, or of a body: one of If, Loop or Scan runs where its node stands.

        A body reads what it captures as its own nodes do; what it is given, and gives, nothing moves past.
        """
        for value in graph.inputs:
            if value not in self.constants:
                self.values.of(value)
        for node in graph:
            for body in bodies_of(node):
                self._graph(body)
            if node in self.fused:
                self._linear(self.fused[node])
            elif not all(v in self.constants for v in node.outputs):
                self._node(node)
        for value in graph.outputs:
            self.graph.values[self.values.of(value)].is_output = True

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return self.shapes.of(value)

    # -- ops --------------------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        view = NodeView(node, self.constants, self.shape)
        if is_standard(node) and node.op_type == "BatchNormalization":
            self._norm(view)
        elif is_standard(node) and node.op_type in LINEAR_OPS and is_linear(view):
            if not self._waits_for_its_bias(view):
                self._linear(Call(node))
        elif is_standard(node) and node.op_type == "Einsum" and (form := linear_einsum(view)) is not None:
            self._linear(Call(node, weight_index=form.weight, behind=form.behind), form)
        else:
            self._translated(view)

    def _translated(self, view: NodeView) -> None:
        node = view.node
        steps = translate(view)
        sources = [view.input(i) for i in steps.reads] if steps is not None else []
        # Laws compare shapes: each value they see must have one.
        later = [view.input(s.other) for s in steps.steps if s.other is not None] if steps is not None else []
        seen = (*sources, *later, *(v for v in node.outputs if v.name))
        if steps is None or any(self.shape(v) is None for v in seen):
            self._opaque(node)
            return
        joins = steps.steps[-1].kind == "concat"
        roles = [f"input_{i}" for i in steps.reads] if joins else ["input", "other"]
        reads = {role: self.values.of(v) for role, v in zip(roles, sources, strict=False) if v is not None}
        scope = self.labels[node]
        for step in steps.steps[:-1]:
            reads = {"input": self._step(step, self._with_other(step, reads, view), scope)}
        reads = self._with_other(steps.steps[-1], reads, view)
        outputs = tuple(self.values.of(v) for v in node.outputs if v.name)
        if is_standard(node) and node.op_type == "Dropout" and len(outputs) > 1:
            # what it drops in eval mode is nothing, whatever the data
            self.graph.add_op("mask", {}, outputs[1:], attrs={}, scope=scope)
            outputs = outputs[:1]
        op = self.graph.add_op(steps.steps[-1].kind, reads, outputs, attrs=steps.steps[-1].attrs, scope=scope)
        if len(steps.steps) == 1:
            self.nodes[op.id] = node

    def _with_other(self, step: Step, reads: dict[str, int], view: NodeView) -> dict[str, int]:
        other = view.input(step.other) if step.other is not None else None
        return reads if other is None else {**reads, "other": self.values.of(other)}

    def _step(self, step: Step, reads: dict[str, int], scope: str, place: str = "") -> int:
        """One of several ops that a node stands for; its result has no name in the file."""
        source = self.graph.values[reads["input"]]
        made = self.graph.add_value(step.shape, dtype=source.dtype)
        self.graph.add_op(step.kind, reads, (made.id,), attrs=step.attrs, scope=scope, place=place)
        return made.id

    def _opaque(self, node: ir.Node) -> None:
        """An op that no law covers: whatever it reads must not change."""
        reads: dict[str, int] = {}
        if not (is_standard(node) and node.op_type in _SHAPE_READERS):
            read = dict.fromkeys(v for v in (*node.inputs, *handed_out(node)) if v is not None)
            reads = {f"input_{i}": self.values.of(v) for i, v in enumerate(read)}
        outputs = tuple(self.values.of(v) for v in node.outputs if v.name)
        self.graph.add_op(opaque_kind(node), reads, outputs, attrs={}, scope=self.labels[node])

    # -- linear layers ----------------------------------------------------------------------------------

    def _waits_for_its_bias(self, view: NodeView) -> bool:
        """A bias added behind a layer that has none belongs to it: both are read where the Add stands."""
        node, shape = view.node, self.shape(view.node.outputs[0]) or ()
        if node.op_type not in PRODUCTS | CONVOLUTIONS or view.input(2) is not None or not shape:
            return False
        behind = view.dims if node.op_type in CONVOLUTIONS else 0
        add = bias_add(node, self.constants, shape[len(shape) - 1 - behind], behind)
        if add is None or self.shape(add.outputs[0]) != shape:
            return False
        self.fused[add] = Call(node, add, behind=behind)
        return True

    def _linear(self, call: Call, form: LinearEinsum | None = None) -> None:
        view = NodeView(call.node, self.constants, self.shape)
        name, label = self._layer(call), self.labels[call.node]
        source = view.input(1 - call.weight_index)
        assert source is not None
        inputs = {"input": self.values.of(source), "weight": self._weight(call, name)}
        if call.node.op_type == "Gemm" and view.attr("transA", 0):
            turn = Step("permute", {"dims": (1, 0)}, tuple(reversed(self.shape(source) or ())))
            inputs["input"] = self._step(turn, {"input": inputs["input"]}, label)
        if call.bias is not None:
            inputs["bias"] = self._bias(call, name)
        output = self.values.of(call.output)
        if form is None:
            step = linear_step(view)
            self.graph.add_op(step.kind, inputs, (output,), attrs=step.attrs, scope=name, place=call.label)
            return
        turn = Step("permute", {"dims": form.before}, form.turned)
        inputs["input"] = self._step(turn, {"input": inputs["input"]}, label)
        product = self._step(Step(form.kind, {}, form.product), inputs, name, place=call.label)
        turned = {"dims": form.after}
        self.graph.add_op("permute", {"input": product}, (output,), attrs=turned, scope=label)

    def _layer(self, call: Call) -> str:
        call.label = self.labels[call.node]
        name = self.known_layers.setdefault(call.alike(), call.label)
        role = "conv" if call.node.op_type.startswith("Conv") else "linear"
        self.layers.setdefault(name, Layer(name, [])).calls.append(call)
        made = Module(name, call.node.op_type, role=role, plain_bias=True)
        module = self.graph.modules.setdefault(name, made)
        module.calls += 1
        return name

    def _weight(self, call: Call, name: str) -> int:
        tensor = self.constants.tensor(call.weight)
        if tensor is None:
            return self.values.of(call.weight)
        return self.values.store_weight(call.weight, f"{name}.weight", tensor)

    def _bias(self, call: Call, name: str) -> int:
        """Biases are short: each layer has one of its own, also where the file keeps one for several."""
        bias = call.bias
        assert bias is not None
        tensor = self.constants.tensor(bias)
        if tensor is None or self.constants.is_dequantized(bias):
            return self.values.of(bias)
        if call.node.op_type == "Gemm":
            tensor = tensor.reshape(-1).expand((self.shape(call.output) or ())[-1])
        return self.values.store(f"{name}.bias", tensor.reshape(-1))

    # -- BatchNorms -------------------------------------------------------------------------------------

    def _norm(self, view: NodeView) -> None:
        node, source = view.node, view.input(0)
        assert source is not None
        data = self.values.of(source)
        name = self._norm_name(node, data)
        role = "norm" if view.attr("spatial", 1) else "custom_norm"
        module = self.graph.modules.setdefault(name, Module(name, node.op_type, role=role))
        module.calls += 1
        inputs = {"input": data}
        for slot, value in zip(_NORM_ROLES, node.inputs[1:], strict=False):
            assert value is not None
            tensor = None if self.constants.is_dequantized(value) else self.constants.tensor(value)
            stored = None if tensor is None else self.values.store(f"{name}.{slot}", tensor)
            inputs[slot] = self.values.of(value) if stored is None else stored
        self.norms.setdefault(name, Norm(name, [])).calls.append(([node], 0))
        outputs = tuple(self.values.of(v) for v in node.outputs if v.name)
        if self.shape(source) is None:
            # Every op around it is then opaque; the verdict must come from them.
            for shapeless in (data, outputs[0]):
                self.graph.values[shapeless].shape = (1, *self.graph.values[inputs["running_var"]].shape)
        self.graph.add_op("batch_norm", inputs, outputs, attrs=batch_norm_attrs(view), scope=name)

    def _norm_name(self, node: ir.Node, data: int) -> str:
        """Alike BatchNorms behind the calls of one layer are one; every other is its own."""
        label = self.labels[node]
        producer = self.graph.producer(self.graph.values[data])
        if producer is None or producer.scope not in self.layers:
            return label
        settings = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
        return self.known_norms.setdefault((producer.scope, settings, *node.inputs[1:]), label)

    def _put_norms_together(self) -> None:
        """BatchNorms in elementary operators; each op of theirs is one node."""

        def is_node(op: Op) -> bool:
            return op.id in self.nodes

        for found in norms_taken_apart(self.graph, is_node):
            nodes = [self.nodes[op.id] for op in found.ops]
            name = self.labels[nodes[0]]
            self.norms[name] = Norm(name, [(nodes, 0 if found.role == "input" else 1)], found.axis)
            put_together(self.graph, found, name, f"{name}.")
