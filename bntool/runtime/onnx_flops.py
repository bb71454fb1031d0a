"""Multiply-adds of an ONNX file, from the shapes of its values."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir

from bntool.files.onnx_files import open_onnx
from bntool.graph.inputs import Inputs

_COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SUBGRAPHS = ("If", "Loop", "Scan")


def onnx_flops(path: Path, inputs: Inputs) -> int | None:
    """Two for each multiply-add of convolutions and matrix products on these inputs, as torch counts them.

    None where a shape stays open, or a subgraph runs an unknown number of times.
    """
    from onnxscript.optimizer import fold_constants

    model = open_onnx(path).model
    given = inputs.tensors()
    if len(given) != len(model.graph.inputs):
        return None
    for value, tensor in zip(model.graph.inputs, given.values(), strict=True):
        value.shape = ir.Shape(given.get(str(value.name), tensor).shape)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None  # the shapes in the file are those of an open batch
    # Also works out the sizes that the graph computes from its inputs.
    fold_constants(model, onnx_shape_inference=True)
    found = [_flops(node) for node in model.graph if node.op_type in (*_COUNTED, *_SUBGRAPHS)]
    return None if None in found else sum(n for n in found if n is not None)


def _flops(node: ir.Node) -> int | None:
    shapes = [_shape(value) for value in (*node.inputs[:2], node.outputs[0])]
    left, right, out = shapes if len(shapes) == 3 else (None, None, None)
    if node.op_type not in _COUNTED or left is None or right is None or out is None:
        return None
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(left) * math.prod(right[1:])
    transposed = node.attributes.get("transA")
    return 2 * math.prod(out) * (left[-2] if transposed and transposed.value else left[-1])


def _shape(value: ir.Value | None) -> list[int] | None:
    if value is None or value.shape is None:
        return None
    lengths = [length for length in value.shape if isinstance(length, int)]
    return lengths if len(lengths) == len(value.shape) else None
