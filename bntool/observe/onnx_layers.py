"""Which ONNX nodes are linear layers and BatchNorms, one or several nodes each, before any of it is a graph.

A MatMul and the Add of its bias are one layer, and so are a convolution and its.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from bntool.observe.onnx_constants import Constants

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
PRODUCTS = frozenset({"MatMul", "Einsum"})
"""Linear layers without a place for a bias."""
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
"""Layers whose bias some exporters add behind them all the same."""


@dataclasses.dataclass
class Call:
    """One run of a linear layer: its node, the Add that holds its bias, and the node's label.

    `weight_index` is the place of its weight among the node's inputs; `behind` counts the axes behind the
    channels where a bias is, or would be, added to the result.
    """

    node: ir.Node
    add: ir.Node | None = None
    label: str = ""
    weight_index: int = 1
    behind: int = 0

    @property
    def last(self) -> ir.Node:
        return self.add or self.node

    @property
    def output(self) -> ir.Value:
        return self.last.outputs[0]

    @property
    def weight(self) -> ir.Value:
        weight = self.node.inputs[self.weight_index]
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
        if self.node.op_type in PRODUCTS and self.add is None:
            return None
        return node.inputs[index] if index < len(node.inputs) else None

    def alike(self) -> tuple[Any, ...]:
        """What two calls must share to be calls of one layer."""
        node = self.node
        settings = tuple(
            (name, node.attributes[name].value)
            for name in ("group", "transB", "alpha", "beta", "equation")
            if name in node.attributes
        )
        return node.op_type, settings, self.weight, self.bias, self.behind


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


def bias_add(node: ir.Node, constants: Constants, features: int, behind: int = 0) -> ir.Node | None:
    """The Add right behind a layer whose other operand is a vector of its output features.

    `behind` counts the axes behind the channels.
    """
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return None
    other = next((v for v in add.inputs if v is not node.outputs[0]), None)
    if other is None or other not in constants:
        return None
    array = constants.array(other)
    if array is None or array.size != features:
        return None
    whole = (1,) * max(array.ndim - 1 - behind, 0) + (features,) + (1,) * behind
    return add if array.shape == whole or (not array.ndim and features == 1) else None
