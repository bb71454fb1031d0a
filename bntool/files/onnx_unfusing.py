"""Layers that ONNX Runtime's optimiser has fused with what follows, written apart again in ONNX's own ops.

com.microsoft FusedConv is act(Conv(x, W, B) + Z), NhwcConv and NhwcFusedConv the same with the channels last,
FusedGemm is act(Gemm(A, B, C)). ONNX Runtime fuses them anew when it loads the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

_DOMAIN = "com.microsoft"
_OWN = {"FusedConv": "Conv", "NhwcConv": "Conv", "NhwcFusedConv": "Conv", "FusedGemm": "Gemm"}
_OF_THE_FUSION = frozenset(
    "activation activation_params activation_alpha activation_beta activation_gamma".split()
)
_NAMES: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
    "": (),
}
"""The activations that can be fused, and what their parameters are called."""


def unfuse(model: ir.Model) -> None:
    """Write every fused layer of the model apart, in bodies too; one of an unknown activation stays."""
    for graph in list(model.graphs()):
        for node in list(graph):
            if node.domain == _DOMAIN and node.op_type in _OWN and _activation(node) in _NAMES:
                _Apart(graph, node, model.opset_imports.get("", 1)).write()


def _activation(node: ir.Node) -> str:
    return node.attributes.get_string("activation", "") or ""


class _Apart:
    """One fused node, and the nodes that do the same one after the other."""

    def __init__(self, graph: ir.Graph, node: ir.Node, opset: int) -> None:
        self.graph, self.node, self.opset = graph, node, opset
        self.name = node.name or str(node.outputs[0].name)
        self.last = node

    def write(self) -> None:
        node, last_axis = self.node, self.node.op_type.startswith("Nhwc")
        inputs = list(node.inputs)
        residual = inputs[3] if len(inputs) > 3 else None
        data = inputs[0]
        if last_axis:
            assert data is not None
            data = self._add("Transpose", [data], perm=_channels_first(_rank_of(node)))
        kept = [a for name, a in node.attributes.items() if name not in _OF_THE_FUSION]
        layer = ir.Node("", _OWN[node.op_type], [data, *inputs[1:3]], kept, name=node.name)
        value = self._put(layer)
        if last_axis:
            value = self._add("Transpose", [value], perm=_channels_last(_rank_of(node)))
        if residual is not None:
            value = self._add("Add", [value, residual])
        for op_type, arguments, attributes in self._activation_node(value):
            value = self._add(op_type, arguments, **attributes)
        output = node.outputs[0]
        value.name, value.type, value.shape = output.name, output.type, output.shape
        output.name = None
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _activation_node(
        self, value: ir.Value
    ) -> Iterator[tuple[str, list[ir.Value | None], dict[str, float]]]:
        kind = _activation(self.node)
        if not kind:
            return
        found = self.node.attributes.get("activation_params")
        numbers = list(found.as_floats()) if found is not None else []
        given = dict(zip(_NAMES[kind], numbers, strict=False))
        for name in _NAMES[kind]:
            own = self.node.attributes.get_float(f"activation_{name}", None)
            given |= {} if own is None else {name: own}
        if kind == "Clip" and self.opset >= 11:
            bounds = [self._constant(name, given[name]) for name in ("min", "max") if name in given]
            yield kind, [value, *bounds], {}
            return
        yield kind, [value], given

    def _constant(self, name: str, number: float) -> ir.Value:
        stored = self.node.inputs[1]
        dtype = stored.dtype.numpy() if stored is not None and stored.dtype is not None else np.float32
        tensor = ir.Tensor(np.array(number, dtype=dtype), name=f"{self.name}_{name}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
        value.shape = ir.Shape(())
        self.graph.register_initializer(value)
        return value

    def _add(self, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        made = ir.node(op_type, inputs, attributes or None, name=f"{self.name}_{op_type}")  # type: ignore[arg-type]
        return self._put(made)

    def _put(self, made: ir.Node) -> ir.Value:
        """Behind what stands there already."""
        self.graph.insert_after(self.last, made)
        self.last = made
        output = made.outputs[0]
        output.name = f"{made.name or self.name}_apart"
        output.type = self.node.outputs[0].type
        return output


def _rank_of(node: ir.Node) -> int:
    """How many axes the data have: as many as the weight."""
    weight = node.inputs[1]
    return len(weight.shape) if weight is not None and weight.shape is not None else 4


def _channels_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _channels_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]
