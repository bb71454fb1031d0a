"""Small ONNX graphs at random, written as other exporters write them, at any opset from 7 on.

`keras` is tf2onnx (channels last at the ends, biases and BatchNorms as arithmetic), `paddle` paddle2onnx
(biases added behind, sizes computed), `mxnet` and `caffe2` theirs of opset 7 and later (weights listed as
inputs, masks of Dropout, scale layers), `legacy` and `dynamo` torch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

STYLES = ("keras", "paddle", "mxnet", "caffe2", "legacy", "dynamo")
_LEAST_IR = ((7, 3), (9, 4), (11, 6), (13, 7), (16, 8), (20, 9), (22, 10))
SIDE = 24


@dataclasses.dataclass
class Value:
    """A value, its channels, and its side; 1 where only channels are left."""

    name: str
    channels: int
    side: int


class Graph:
    """A graph that grows node by node, each in the spelling of its opset."""

    def __init__(self, seed: int, style: str, opset: int, dtype: Any = np.float32) -> None:
        self.random = np.random.default_rng(seed)
        self.style, self.opset, self.dtype = style, opset, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.norms = 0

    # -- numbers and nodes ------------------------------------------------------------------------------

    def constant(self, array: Any, stem: str) -> str:
        array = np.asarray(array)
        array = array.astype(self.dtype) if array.dtype.kind == "f" else array
        name = f"{stem}_{len(self.tensors) + len(self.nodes)}"
        if self.style in ("legacy", "dynamo") and array.size < 9:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def numbers(self, *shape: int, scale: float = 0.4) -> Any:
        return self.random.normal(size=shape) * scale

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        names = [f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        label = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), names, name=label, **attributes))
        return names[0]

    def with_axes(self, op: str, value: str, axes: list[int], since: int, **attributes: Any) -> str:
        """An op whose axes are an input from `since` on, an attribute before."""
        if self.opset >= since:
            return self.node(op, [value, self.constant(np.array(axes, np.int64), "axes")], **attributes)
        return self.node(op, [value], axes=axes, **attributes)

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    # -- layers -----------------------------------------------------------------------------------------

    def conv(self, x: Value, out: int, kernel: int = 3, groups: int = 1) -> Value:
        weight = self.constant(self.numbers(out, x.channels // groups, kernel, kernel), "weight")
        pads = [kernel // 2] * 4
        inputs = [x.name, weight]
        biased = self.chance(0.5)
        added = biased and self.style in ("keras", "paddle")
        if biased and not added:
            inputs.append(self.constant(self.numbers(out), "bias"))
        name = self.node("Conv", inputs, kernel_shape=[kernel] * 2, pads=pads, group=groups)
        if added:
            name = self.node("Add", [name, self.constant(self.numbers(1, out, 1, 1), "bias")])
        return Value(name, out, x.side)

    def norm(self, x: Value) -> Value:
        self.norms += 1
        c = x.channels
        gamma, beta = self.random.uniform(0.5, 1.5, c), self.numbers(c)
        mean, variance = self.numbers(c), self.random.uniform(0.5, 2, c)
        if self.style == "mxnet" and self.chance(0.3):
            gamma = np.ones(c)
        if self.style == "keras" and self.chance(0.6):
            return Value(self._written_out(x, gamma, beta, mean, variance), c, x.side)
        parts = [self.constant(array, "bn") for array in (gamma, beta, mean, variance)]
        more = {"momentum": 0.9} if self.chance(0.5) else {}
        name = self.node("BatchNormalization", [x.name, *parts], epsilon=1e-3, **more)
        if self.style == "caffe2" and self.chance(0.5):
            scale = self.constant(self.random.uniform(0.5, 1.5, (1, c, 1, 1)), "scale")
            name = self.node("Mul", [name, scale])
            name = self.node("Add", [name, self.constant(self.numbers(1, c, 1, 1), "shift")])
        return Value(name, c, x.side)

    def _written_out(self, x: Value, gamma: Any, beta: Any, mean: Any, variance: Any) -> str:
        """(x - μ)/√(σ²+ε)·γ + β as far as the exporter has folded its constants."""
        spread = np.sqrt(variance + 1e-3)

        def channel(array: Any) -> str:
            return self.constant(array.reshape(1, -1, 1, 1), "bn")

        form = self.random.integers(3)
        if form == 0:
            made = self.node("Mul", [x.name, channel(gamma / spread)])
            return self.node("Add", [made, channel(beta - mean * gamma / spread)])
        if form == 1:
            made = self.node("Sub", [x.name, channel(mean)])
            made = self.node("Div", [made, channel(spread)])
            made = self.node("Mul", [made, channel(gamma)])
            return self.node("Add", [made, channel(beta)])
        eps = self.constant(np.array(1e-3), "eps")
        root = self.node("Sqrt", [self.node("Add", [channel(variance), eps])])
        factor = self.node("Mul", [self.node("Reciprocal", [root]), channel(gamma)])
        shift = self.node("Sub", [channel(beta), self.node("Mul", [channel(mean), factor])])
        return self.node("Add", [self.node("Mul", [x.name, factor]), shift])

    def activation(self, x: Value) -> Value:
        kind = self.random.choice(["Relu", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSwish", "PRelu"])
        if kind == "Clip":
            name = self._clip(x.name, 0.0, 6.0)
        elif kind == "PRelu":
            name = self.node("PRelu", [x.name, self.constant(self.numbers(x.channels, 1, 1) ** 2, "slope")])
        elif kind == "HardSwish":
            three, six = (self.constant(np.array(n), "number") for n in (3.0, 6.0))
            gate = self._clip(self.node("Add", [x.name, three]), 0.0, 6.0)
            name = self.node("Div", [self.node("Mul", [x.name, gate]), six])
        elif kind == "Sigmoid":
            name = self.node("Mul", [x.name, self.node("Sigmoid", [x.name])])
        else:
            name = self.node(kind, [x.name])
        return dataclasses.replace(x, name=name)

    def _clip(self, value: str, low: float, high: float) -> str:
        if self.opset < 11:
            return self.node("Clip", [value], min=low, max=high)
        bounds = [self.constant(np.array(n), "bound") for n in (low, high)]
        return self.node("Clip", [value, *bounds])

    def block(self, x: Value) -> Value:
        out = int(self.random.choice([4, 6, 8]))
        groups = x.channels if self.chance(0.2) else 1
        made = self.conv(x, x.channels if groups > 1 else out, int(self.random.choice([1, 3])), groups)
        made = self.norm(made) if self.chance(0.8) else made
        return self.activation(made)

    def dropout(self, x: Value) -> Value:
        mask = 2 if self.style in ("mxnet", "caffe2") else 1
        if self.opset >= 12:
            ratio = self.constant(np.array(0.5), "ratio")
            return dataclasses.replace(x, name=self.node("Dropout", [x.name, ratio], mask))
        return dataclasses.replace(x, name=self.node("Dropout", [x.name], mask, ratio=0.5))

    def pooled(self, x: Value) -> Value:
        kind = self.random.choice(["MaxPool", "AveragePool"])
        name = self.node(kind, [x.name], kernel_shape=[2, 2], strides=[2, 2])
        return Value(name, x.channels, x.side // 2)

    def residual(self, x: Value) -> Value:
        branch = self.conv(self.activation(self.norm(self.conv(x, x.channels))), x.channels)
        branch = self.norm(branch) if self.chance(0.7) else branch
        name = self.node("Sum" if self.style == "caffe2" else "Add", [branch.name, x.name])
        return self.activation(Value(name, x.channels, x.side))

    def joined(self, x: Value) -> Value:
        parts = [self.norm(self.conv(x, 4, 1)), self.conv(x, 4, 3)]
        made = Value(self.node("Concat", [part.name for part in parts], axis=1), 8, x.side)
        return self.activation(self.norm(made))

    def gated(self, x: Value) -> Value:
        """Squeeze and excitation."""
        if self.style == "keras":
            pooled = self.with_axes("ReduceMean", x.name, [2, 3], 18, keepdims=1)
        else:
            pooled = self.node("GlobalAveragePool", [x.name])
        inner = self.conv(Value(pooled, x.channels, 1), x.channels, 1)
        gate = self.node("Sigmoid", [inner.name])
        return dataclasses.replace(x, name=self.node("Mul", [x.name, gate]))

    def enlarged(self, x: Value) -> Value:
        scales = [1.0, 1.0, 2.0, 2.0]
        if self.opset < 9:
            name = self.node("Upsample", [x.name], mode="nearest", scales=scales)
        else:
            stored = numpy_helper.from_array(np.array(scales, np.float32), f"scales_{len(self.nodes)}")
            self.tensors.append(stored)
            op = "Upsample" if self.opset < 10 else "Resize"
            inputs = [x.name, stored.name] if self.opset < 11 else [x.name, "", stored.name]
            name = self.node(op, inputs, mode="nearest")
        return Value(name, x.channels, x.side * 2)

    def turned(self, x: Value) -> Value:
        """To channels last and back, with the BatchNorm between the two where the exporter left it."""
        last = self.node("Transpose", [x.name], perm=[0, 2, 3, 1])
        scale = self.constant(self.random.uniform(0.5, 1.5, x.channels), "bn")
        last = self.node("Mul", [last, scale])
        last = self.node("Add", [last, self.constant(self.numbers(x.channels), "bn")])
        self.norms += 1
        return dataclasses.replace(x, name=self.node("Transpose", [last], perm=[0, 3, 1, 2]))

    def head(self, x: Value) -> Value:
        """Pooled, flattened by a size that may be computed, and one linear layer."""
        pooled = self.node("GlobalAveragePool", [x.name])
        if self.style == "paddle" and self.opset >= 13:
            shape = self.node("Shape", [pooled])
            ends = [self.constant(np.array([n], np.int64), "size") for n in (0, 1, x.channels)]
            batch = self.node("Slice", [shape, ends[0], ends[1]])
            flat = self.node("Reshape", [pooled, self.node("Concat", [batch, ends[2]], axis=0)])
        elif self.style == "keras":
            flat = self.with_axes("Squeeze", pooled, [2, 3], 13)
        else:
            flat = self.node("Flatten", [pooled])
        weight = self.numbers(5, x.channels)
        if self.style in ("keras", "paddle"):
            made = self.node("MatMul", [flat, self.constant(weight.T, "weight")])
            return Value(self.node("Add", [made, self.constant(self.numbers(5), "bias")]), 5, 1)
        layer = [flat, self.constant(weight, "weight"), self.constant(self.numbers(5), "bias")]
        return Value(self.node("Gemm", layer, transB=1), 5, 1)


def drawn(seed: int, style: str, opset: int, dtype: Any = np.float32) -> tuple[onnx.ModelProto, int]:
    """A model of some ten layers, and how many BatchNorms are in it, written out or not."""
    g = Graph(seed, style, opset, dtype)
    last = style == "keras"
    x = Value(g.node("Transpose", ["x"], perm=[0, 3, 1, 2]) if last else "x", 3, SIDE)
    if style == "mxnet" and g.chance(0.5):
        x = dataclasses.replace(x, name=g.node("Sub", [x.name, g.constant(g.numbers(1, 3, 1, 1), "mean")]))
    x = g.block(x)
    for _ in range(int(g.random.integers(2, 6))):
        steps = [g.block, g.residual, g.joined, g.gated, g.dropout]
        steps += [g.pooled] if x.side > 6 else [g.enlarged]
        steps += [g.turned] if last else []
        x = steps[int(g.random.integers(len(steps)))](x)
    if g.chance(0.6):
        x = g.head(x)
    elif last:
        x = dataclasses.replace(x, name=g.node("Transpose", [x.name], perm=[0, 2, 3, 1]))
    kind = helper.np_dtype_to_tensor_dtype(g.dtype)
    shape = ["n", SIDE, SIDE, 3] if last else ["n", 3, SIDE, SIDE]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    ir_version = next(v for least, v in reversed(_LEAST_IR) if opset >= least)
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in g.tensors]
    outputs = [helper.make_tensor_value_info(x.name, kind, None)]
    graph = helper.make_graph(g.nodes, style, inputs, outputs, g.tensors)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name=style), g.norms
