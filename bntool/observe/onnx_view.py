"""One ONNX node with its attributes, constant inputs and shapes at hand; what makes it a linear layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from bntool.observe.onnx_constants import Constants

Shape = tuple[int, ...]

_EPSILON = float(np.float32(1e-5))
"""Attributes are float32, defaults too."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One neutral op of a node; `shape` is that of its result, where more steps follow.

    `other` numbers the input of the node that a later step reads beside what the step before made.
    """

    kind: str
    attrs: dict[str, Any]
    shape: Shape = ()
    other: int | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a node does: steps in turn; `reads` numbers the node's inputs that carry data."""

    steps: tuple[Step, ...]
    reads: tuple[int, ...] = (0,)


class NodeView:
    """A node with its attributes, constant inputs and shapes at hand."""

    def __init__(
        self, node: ir.Node, constants: Constants, shapes: Callable[[ir.Value | None], Shape | None]
    ) -> None:
        self.node = node
        self.constants = constants
        self.version = constants.version
        self._shapes = shapes

    def attr(self, name: str, default: Any = None) -> Any:
        found = self.node.attributes.get(name)
        if found is None:
            return default
        value = found.value
        return tuple(value) if isinstance(value, list | tuple) else value

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def shape(self, index: int = 0) -> Shape | None:
        return self._shapes(self.input(index))

    def result(self, index: int = 0) -> Shape | None:
        return self._shapes(self.node.outputs[index])

    def integers(self, index: int, attribute: str) -> tuple[list[int] | None, bool]:
        """A list given as an attribute or a constant input (None if absent), and whether it is known."""
        if attribute in self.node.attributes:
            return list(self.attr(attribute)), True
        value = self.input(index)
        if value is None:
            return None, True
        numbers = self.constants.integers(value)
        return numbers, numbers is not None

    @property
    def dims(self) -> int:
        shape = self.shape()
        return len(shape) - 2 if shape is not None else 0

    def pads(self) -> tuple[int, ...] | str:
        """The explicit padding, or `same` where the runtime works it out."""
        mode = self.attr("auto_pad", "NOTSET")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            return "same"
        if mode == "VALID":
            return (0,) * self.dims
        return tuple(self.attr("pads", (0,) * (2 * self.dims)))


def is_linear(view: NodeView) -> bool:
    """Whether the node computes W·x (+ b per output channel) of data x, with shapes that are known."""
    source, weight, result = view.shape(0), view.shape(1), view.result()
    if source is None or weight is None or not result or view.input(0) in view.constants:
        return False
    if view.node.op_type == "MatMul":
        return len(weight) == 2 and view.input(1) in view.constants
    if view.node.op_type == "Gemm" and view.input(2) is not None:
        bias = view.shape(2)
        return bias is not None and all(n == 1 for n in bias[:-1]) and bias[-1:] in ((), (1,), result[-1:])
    return True


def linear_step(view: NodeView) -> Step:
    """The kind and attributes of a linear layer."""
    op_type = view.node.op_type
    if op_type in ("Gemm", "MatMul"):
        return Step("linear" if view.attr("transB", 0) else "matmul", {})
    dims = view.dims
    output_padding = tuple(view.attr("output_padding", (0,) * dims))
    if "output_shape" in view.node.attributes:
        output_padding = (1,) * dims  # the runtime chooses it
    return Step(
        "conv",
        {
            "dims": dims,
            "transposed": op_type == "ConvTranspose",
            "stride": tuple(view.attr("strides", (1,) * dims)),
            "padding": view.pads(),
            "dilation": tuple(view.attr("dilations", (1,) * dims)),
            "groups": int(view.attr("group", 1)),
            "output_padding": output_padding,
        },
    )


def batch_norm_attrs(view: NodeView) -> dict[str, Any]:
    """A BatchNormalization's attributes; before opset 14 its further outputs say that it is in training."""
    training = bool(view.attr("training_mode", 0)) or (view.version < 7 and not view.attr("is_test", 0))
    if view.version < 14:
        training |= any(v.name for v in view.node.outputs[1:])
    alone = {} if view.attr("spatial", 1) else {"elementwise": True}
    return {"eps": float(view.attr("epsilon", _EPSILON)), "training": training, "axis": 1, **alone}
