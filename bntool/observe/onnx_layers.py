"""Which ONNX nodes are linear layers and BatchNorms, one or several nodes each, before any of it is a graph.

A MatMul and the Add of its bias are one layer. Constant factors and summands per channel, right behind a
linear layer, are one BatchNorm that an exporter has taken apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from bntool.observe.onnx_constants import Constants

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_CHAINED = frozenset({"Mul", "Add", "Sub", "Div"})


@dataclasses.dataclass
class Call:
    """One run of a linear layer: its node, the Add that holds the bias of a MatMul, and the node's label."""

    node: ir.Node
    add: ir.Node | None = None
    label: str = ""

    @property
    def last(self) -> ir.Node:
        return self.add or self.node

    @property
    def output(self) -> ir.Value:
        return self.last.outputs[0]

    @property
    def weight(self) -> ir.Value:
        weight = self.node.inputs[1]
        assert weight is not None
        return weight

    @property
    def bias_place(self) -> tuple[ir.Node, int]:
        """The node and the input index at which the bias stands, or would stand."""
        if self.add is None:
            return self.node, 2
        return self.add, 1 if self.add.inputs[0] is self.node.outputs[0] else 0

    @property
    def bias(self) -> ir.Value | None:
        node, index = self.bias_place
        if self.node.op_type == "MatMul" and self.add is None:
            return None
        return node.inputs[index] if index < len(node.inputs) else None

    def alike(self) -> tuple[Any, ...]:
        """What two calls must share to be calls of one layer."""
        node = self.node
        settings = tuple(
            (name, node.attributes[name].value)
            for name in ("group", "transB", "alpha", "beta")
            if name in node.attributes
        )
        return node.op_type, settings, self.weight, self.bias


@dataclasses.dataclass
class Layer:
    """A linear layer: its name, and every call of it."""

    name: str
    calls: list[Call]


@dataclasses.dataclass
class Norm:
    """A BatchNorm: for each call its nodes in order, and which input of the first one is the data.

    `axis` is set for one that was taken apart: where its channels lie.
    """

    name: str
    calls: list[tuple[list[ir.Node], int]]
    axis: int | None = None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value which nobody else sees."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    producer = value.producer()
    return node if producer is not None and node.graph is producer.graph else None


def bias_add(node: ir.Node, constants: Constants, features: int) -> ir.Node | None:
    """The Add right behind a MatMul whose other operand is a vector of its output features."""
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return None
    other = next((v for v in add.inputs if v is not node.outputs[0]), None)
    if other is None or other not in constants:
        return None
    array = constants.array(other)
    if array is None or array.size != features or (array.ndim and array.shape[-1] != features):
        return None
    return add


@dataclasses.dataclass(frozen=True)
class Chain:
    """Elementwise nodes in a row, and what they compute together: scale and shift per channel."""

    nodes: list[ir.Node]
    data: int
    scale: Tensor
    shift: Tensor


def chain_behind(
    value: ir.Value,
    axis: int,
    shape: tuple[int, ...],
    constants: Constants,
    keeps_shape: Callable[[ir.Node], bool],
) -> Chain | None:
    """The BatchNorm in elementary ops that starts at `value`, whose channels lie along `axis`.

    There is one where some factor is a vector of the channels; scalars and summands alone are none.
    """
    start, channels = value, shape[axis]
    scale, shift = (torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))
    nodes: list[ir.Node] = []
    by_channel = False
    while True:
        node = only_reader(value)
        if node is None or node.op_type not in _CHAINED or not keeps_shape(node):
            break
        first = node.inputs[0] is value
        factor = _per_channel(node.inputs[1 if first else 0], axis, shape, constants)
        if factor is None or (node.op_type == "Div" and not first):
            break
        if node.op_type in ("Mul", "Div"):
            by_channel |= factor.numel() == channels and channels > 1
            factor = factor if node.op_type == "Mul" else 1 / factor
            scale, shift = scale * factor, shift * factor
        elif node.op_type == "Add":
            shift = shift + factor
        else:
            scale, shift = (scale, shift - factor) if first else (-scale, factor - shift)
        nodes.append(node)
        value = node.outputs[0]
    if not by_channel:
        return None
    return Chain(nodes, 0 if nodes[0].inputs[0] is start else 1, scale, shift)


def _per_channel(
    value: ir.Value | None, axis: int, shape: tuple[int, ...], constants: Constants
) -> Tensor | None:
    """A constant operand as a float64 vector of channels, or of length one; None for anything else."""
    array = constants.array(value) if value in constants else None
    if array is None or array.ndim > len(shape) or not np.issubdtype(_real(array), np.floating):
        return None
    wide = (1,) * (len(shape) - array.ndim) + array.shape
    if any(size != 1 for i, size in enumerate(wide) if i != axis) or wide[axis] not in (1, shape[axis]):
        return None
    return torch.from_numpy(array.astype(np.float64).reshape(-1).copy())


def _real(array: Any) -> Any:
    """The type of an array's numbers; bfloat16, which numpy does not count among the floats, is one."""
    return np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype
