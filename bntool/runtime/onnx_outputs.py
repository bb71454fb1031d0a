"""What a file says of each output: the coarsest type on the way to it, and a squashing op at its end."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

_TYPES: dict[int | None, torch.dtype] = {
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
}
_MOVES = frozenset("Reshape Transpose Concat Squeeze Unsqueeze Flatten Identity Slice Split Gather".split())
_SQUASHING = frozenset({"Sigmoid", "Softmax"})
_SCALING = frozenset({"Mul", "Add"})
_SHORT = 1 << 12
_ROOM = 2.0
"""An error is a maximum over few draws: what is measured here, and what a file meets."""


class OutputTraits:
    """`eps` of the coarsest floating type through which the numbers of each output go, and `slack`: what the
    runtime's own Sigmoid or Softmax may be off by at its end, times a constant behind it, whatever is left of
    the peak; else zero.
    """

    def __init__(self, path: str | Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._declared = {i.name: i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)}
        self._numbers = _small_numbers(graph)
        self.eps = {info.name: self._eps_of(info.name) for info in graph.output}
        self.slack = {info.name: self._slack_of(info.name) for info in graph.output}

    def _eps_of(self, output: str) -> float:
        found, waiting, seen = 0.0, [output], {output}
        while waiting:
            name = waiting.pop()
            node = self._makers.get(name)
            for kind in (self._stored.get(name), self._declared.get(name), *_types_of(node)):
                if kind in _TYPES:
                    found = max(found, torch.finfo(_TYPES[kind]).eps)
            new = [value for value in (node.input if node else ()) if value not in seen]
            seen.update(new)
            waiting += new
        return found

    def _slack_of(self, output: str) -> float:
        if self._declared.get(output) != TensorProto.FLOAT:
            return 0.0
        slack, waiting, seen = 0.0, [(output, 1.0)], {output}
        while waiting:
            name, factor = waiting.pop()
            node = self._makers.get(name)
            if node is None or node.op_type not in _MOVES | _SQUASHING | _SCALING:
                return 0.0
            if node.op_type in _SQUASHING:
                slack = max(slack, factor * error_of(node.op_type))
                continue
            data = list(node.input if node.op_type == "Concat" else node.input[:1])
            if node.op_type in _SCALING:
                numbers = [self._numbers.get(value) for value in node.input]
                data = [v for v, known in zip(node.input, numbers, strict=True) if known is None]
                known = [n for n in numbers if n is not None]
                if len(data) != 1 or len(known) != 1:
                    return 0.0
                factor *= float(np.abs(known[0]).max()) if node.op_type == "Mul" else 1.0
            waiting += [(value, factor) for value in data if value not in seen]
            seen.update(data)
        return _ROOM * slack


def _small_numbers(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The numbers of short constants, which scale or shift an output."""
    held = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    for node in graph.node:
        if node.op_type == "Constant":
            held.update((node.output[0], a.t) for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
    short = {name: t for name, t in held.items() if 0 < math.prod(t.dims) <= _SHORT}
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in short.items()}


def _types_of(node: onnx.NodeProto | None) -> Iterator[int]:
    """The types that a node itself names: what a Cast makes, and the numbers of a Constant."""
    for attribute in node.attribute if node is not None else ():
        if node is not None and node.op_type == "Cast" and attribute.name == "to":
            yield attribute.i
        elif attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t.data_type


@functools.cache
def error_of(operator: str) -> float:
    """By how much ONNX Runtime's own implementation of an operator from 0 to 1 errs, measured in float32."""
    rows = np.linspace(-20, 20, 8 * 512, dtype=np.float32).reshape(512, 8)
    if operator == "Softmax":
        rows = rows[:, ::-1] * np.linspace(0, 1, 8, dtype=np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, rows.shape) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": rows})
    exact = torch.from_numpy(np.ascontiguousarray(rows)).double()
    expected = exact.sigmoid() if operator == "Sigmoid" else exact.softmax(-1)
    return float((torch.from_numpy(np.ascontiguousarray(found)).double() - expected).abs().max())
