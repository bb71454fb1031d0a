"""What a file says of each output: the coarsest type on the way to it, and a squashing op at its end."""

from __future__ import annotations

import functools
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
_ROOM = 2.0
"""An error is a maximum over few draws: what is measured here, and what a file meets."""


class OutputTraits:
    """`eps` of the coarsest floating type through which the numbers of each output go, and `slack`: what the
    runtime's own Sigmoid or Softmax may be off by at its end, whatever is left of the peak; else zero.
    """

    def __init__(self, path: str | Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._declared = {i.name: i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)}
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
        ends, waiting, seen = set(), [output], {output}
        while waiting:
            node = self._makers.get(waiting.pop())
            if node is None or node.op_type not in _MOVES | _SQUASHING:
                return 0.0
            if node.op_type in _SQUASHING:
                ends.add(node.op_type)
                continue
            data = node.input if node.op_type == "Concat" else node.input[:1]
            new = [value for value in data if value not in seen]
            seen.update(new)
            waiting += new
        return _ROOM * max(map(error_of, ends), default=0.0)


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
