"""The neutral values of an ONNX graph: data, constants with their numbers, tensors a fold may change."""

from __future__ import annotations

import math

import onnx_ir as ir
from torch import Tensor

from bntool.graph.dataflow import Graph
from bntool.observe.onnx_constants import Constants
from bntool.observe.onnx_shapes import Shapes

_MAX_OPERAND = 1 << 16
"""A constant of more elements is no factor per channel; its numbers are not read."""

OWN = "@initializer"
"""The end of the handle of an operand, behind its initializer's name: no tensor of a layer is called so."""
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "PRelu"})


class Values:
    """Neutral values by ONNX value, and stored tensors by handle."""

    def __init__(self, graph: Graph, shapes: Shapes, constants: Constants, main: ir.Graph) -> None:
        self.graph, self.shapes, self.constants, self.main = graph, shapes, constants, main
        self.ids: dict[ir.Value, int] = {}
        self.stored: dict[str, int] = {}

    def of(self, value: ir.Value) -> int:
        """The neutral value; a constant keeps its numbers where a law may ask for them."""
        if value in self.ids:
            return self.ids[value]
        shape, constant = self.shapes.of(value), value in self.constants
        tensor = None
        if constant and math.prod(shape or ()) <= _MAX_OPERAND and not self.constants.is_dequantized(value):
            tensor = self.constants.tensor(value)
            shape = shape if tensor is None else tuple(tensor.shape)
        dtype = self.shapes.dtype(str(value.name))
        name = str(value.name)
        made = self.graph.add_value(shape or (), constant=constant, dtype=dtype, name=name)
        self.ids[value] = made.id
        if tensor is not None and tensor.is_floating_point() and self._is_own(value):
            made.handle = f"{name}{OWN}"
            self.graph.tensors[made.handle] = tensor
        elif tensor is not None:
            self.graph.constants[made.id] = tensor
        return made.id

    def store(self, handle: str, tensor: Tensor) -> int:
        """The value of a tensor that a fold may change."""
        if handle not in self.stored:
            self.graph.tensors[handle] = tensor
            dtype = str(tensor.dtype)
            made = self.graph.add_value(tuple(tensor.shape), handle=handle, constant=True, dtype=dtype)
            self.stored[handle] = made.id
        return self.stored[handle]

    def store_weight(self, weight: ir.Value, handle: str, tensor: Tensor) -> int:
        """The value of a weight, which is one however many layers read it."""
        known = self.ids.get(weight)
        if known is not None and self.graph.values[known].handle:
            return known
        made = self.ids[weight] = self.store(handle, tensor)
        if known is not None:
            self.block(made)
        return made

    def block(self, value: int) -> None:
        """Say to the planner that somebody else reads a stored tensor, who asks for no change."""
        self.graph.add_op("another layer", {"input": value}, (), attrs={})

    def _is_own(self, value: ir.Value) -> bool:
        """Whether it is an initializer that one elementwise node alone reads: it may take a map in."""
        uses = list(value.uses())
        if self.main.initializers.get(str(value.name)) is not value or len(uses) != 1:
            return False
        node = uses[0].node
        outside = value.is_graph_input() or value.is_graph_output() or node.graph is not self.main
        return not outside and node.op_type in _ELEMENTWISE and node.domain in ("", "ai.onnx")
