"""Rewire an ONNX graph in memory: store tensors, take nodes out, and keep every name that others rely on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from bntool.observe.onnx_constants import to_onnx
from bntool.observe.onnx_nodes import bodies_of

Place = tuple[ir.Node, int]
"""A node, and the index of one of its inputs."""


class Wiring:
    """The graph of a model under surgery; new tensors go to the main one, where bodies see them too."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.listed = (model.ir_version or 0) < 4
        """Whether initializers are listed among the inputs, as the file format asked for then."""
        self.taken = _names(model.graph)
        self.released: list[ir.Value] = []

    # -- tensors ----------------------------------------------------------------------------------------

    def store(self, old: ir.Value, places: Iterable[Place], tensor: Tensor) -> None:
        """Put a tensor where `places` read `old`: in its stead where nobody else reads it, else beside it."""
        places = list(places)
        name = str(old.name)
        own = all((use.node, use.idx) in places for use in old.uses()) and not old.is_graph_output()
        if own and old.is_initializer():
            doc = old.const_value.doc_string if old.const_value is not None else None
            old.const_value = to_onnx(tensor, name, doc)
            old.shape = ir.Shape(tuple(tensor.shape))
            return
        value = self.new_initializer(f"{name}_folded", tensor)
        for node, index in places:
            node.replace_input_with(index, value)
        self.released.append(old)

    def new_initializer(self, name: str, tensor: Tensor) -> ir.Value:
        stored = to_onnx(tensor, self._free(name))
        shape = ir.Shape(tuple(tensor.shape))
        value = ir.Value(name=stored.name, shape=shape, type=ir.TensorType(stored.dtype), const_value=stored)
        self.graph.register_initializer(value)
        if self.listed:
            self.graph.inputs.append(value)
        return value

    def _free(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            number += 1
            candidate = f"{name}_{number}"
        self.taken.add(candidate)
        return candidate

    # -- nodes ------------------------------------------------------------------------------------------

    def take_out(self, nodes: Sequence[ir.Node], data: int) -> None:
        """Nodes in a row go: whoever read the last output now reads input `data` of the first.

        An output of the model keeps its name.
        """
        source, output = nodes[0].inputs[data], nodes[-1].outputs[0]
        assert source is not None
        maker = source.producer()
        outside = maker is None or maker.graph is not nodes[-1].graph
        if output.is_graph_output() and (outside or source.is_graph_output()):
            self._insert_behind(nodes[-1], "Identity", [source], output)
            self._remove(nodes)
            return
        self.put_instead(source, output)
        self._remove(nodes)

    def put_instead(self, source: ir.Value, output: ir.Value) -> None:
        """Whoever read `output` now reads `source`, which a node gives.

        An output of the model keeps its name.
        """
        if output.is_graph_output():
            name = str(output.name)
            output.name = self._free(f"{name}_removed")
            source.name, source.type, source.shape = name, output.type, output.shape
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        self.released.append(output)

    def add_behind(self, node: ir.Node, bias: ir.Value) -> None:
        """`node` + bias in place of what `node` gives; the sum takes over its name."""
        product = node.outputs[0]
        self._insert_behind(node, "Add", [product, bias], product)

    def batch_norm_behind(
        self, node: ir.Node, name: str, tensors: Sequence[Tensor], eps: float, momentum: float
    ) -> None:
        """A BatchNormalization (γ, β, μ, σ², each (C,)) reads what `node` gives; it takes over the name.

        `momentum` is ONNX's, the share of the running statistics that stays.
        """
        stored = [
            self.new_initializer(f"{name}.{role}", tensor)
            for role, tensor in zip(("weight", "bias", "running_mean", "running_var"), tensors, strict=True)
        ]
        output = node.outputs[0]
        made = self._insert_behind(node, "BatchNormalization", [output, *stored], output)
        made.name = self._free(name)
        made.attributes.add(ir.AttrFloat32("epsilon", eps))
        made.attributes.add(ir.AttrFloat32("momentum", momentum))

    def rewrite_as_mul_add(self, nodes: Sequence[ir.Node], data: int, scale: Tensor, shift: Tensor) -> None:
        """Elementwise nodes in a row become one Mul and one Add."""
        source, output = nodes[0].inputs[data], nodes[-1].outputs[0]
        stem = nodes[0].name or str(output.name)
        factor = self.new_initializer(f"{stem}_scale", scale)
        summand = self.new_initializer(f"{stem}_shift", shift)
        last = self._insert_behind(nodes[-1], "Mul", [source, factor], output)
        self._insert_behind(last, "Add", [last.outputs[0], summand], last.outputs[0])
        self._remove(nodes)

    def _insert_behind(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], output: ir.Value
    ) -> ir.Node:
        """A new node whose result replaces `output`, name and all; `output` itself gets another name."""
        name = str(output.name)
        output.name = self._free(f"{name}_before_{op_type.lower()}")
        result = ir.Value(name=name, type=output.type, shape=output.shape)
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        label = self._free(f"{node.name or name}_{op_type}")
        made = ir.Node("", op_type, inputs, outputs=[result], name=label)
        _graph_of(node).insert_after(node, made)
        return made

    def _remove(self, nodes: Iterable[ir.Node]) -> None:
        for node in reversed(list(nodes)):
            self.released += [v for v in node.inputs if v is not None]
            _graph_of(node).remove(node, safe=True)

    def drop_unused(self) -> None:
        """Drop what only the removed nodes read: initializers, and constant nodes that nobody reads now."""
        while self.released:
            value = self.released.pop()
            if value.uses() or value.is_graph_output():
                continue
            producer = value.producer()
            if producer is not None:
                read = any(v.uses() or v.is_graph_output() for v in producer.outputs)
                if producer.graph is not None and not read:
                    self._remove([producer])
            elif value.is_initializer() and (graph := value.graph) is not None:
                del graph.initializers[str(value.name)]
                if value in graph.inputs:
                    graph.inputs.remove(value)


def bind_branches(model: ir.Model, *, taken: bool) -> None:
    """Have every If take its then-branch, or its else-branch, whatever the data."""
    condition = Wiring(model).new_initializer("branch_taken", torch.tensor(taken))
    for node in model.graph.all_nodes():
        if node.op_type == "If":
            node.replace_input_with(0, condition)


def _graph_of(node: ir.Node) -> ir.Graph:
    """The main graph, or the body that a node stands in."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _names(graph: ir.Graph) -> set[str]:
    """Every name of a value or a node, in bodies too."""
    names: set[str] = set()
    graphs = [graph]
    while graphs:
        current = graphs.pop()
        names.update(str(v.name) for v in (*current.inputs, *current.initializers.values()))
        for node in current:
            names.update(str(v.name) for v in node.outputs)
            names.add(str(node.name))
            graphs += bodies_of(node)
    return names
