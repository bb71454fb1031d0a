"""Shapes inside the bodies of If, Loop and Scan, by inference on each as a model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from bntool.observe.onnx_nodes import bodies_of
from bntool.observe.onnx_shapes import Shapes

Known = tuple[tuple[int, ...], int]
"""Shape and type (ONNX's code) of a value."""


def infer_bodies(model: ir.Model, shapes: Shapes) -> None:
    """Add to `shapes` what the bodies hold: the values around them must be known by then."""
    for node in model.graph:
        _infer_in(node, model, shapes)


def _infer_in(node: ir.Node, model: ir.Model, shapes: Shapes) -> None:
    for body in bodies_of(node):
        for value, known in zip(body.inputs, _given(node, shapes), strict=False):
            name = str(value.name)
            if known is not None and name not in shapes.sizes:
                shapes.sizes[name], shapes.types[name] = known
        for name, (sizes, kind) in _inferred(body, model, shapes).items():
            shapes.sizes.setdefault(name, sizes)
            shapes.types.setdefault(name, kind)
        for inner in body:
            _infer_in(inner, model, shapes)


def _given(node: ir.Node, shapes: Shapes) -> Iterator[Known | None]:
    """What each input of a body is given: of Loop a count, a condition and the values that it carries on."""

    def known(value: ir.Value | None) -> Known | None:
        name = "" if value is None else str(value.name)
        return (
            (shapes.sizes[name], shapes.types[name])
            if name in shapes.sizes and name in shapes.types
            else None
        )

    if node.op_type == "Loop":
        yield (), onnx.TensorProto.INT64
        yield (), onnx.TensorProto.BOOL
        yield from map(known, node.inputs[2:])
    elif node.op_type == "Scan":
        slices = node.attributes.get_int("num_scan_inputs", 0) or 0
        axes = node.attributes.get_ints("scan_input_axes", None) or [0] * slices
        states = len(node.inputs) - slices
        yield from map(known, node.inputs[:states])
        for value, axis in zip(node.inputs[states:], axes, strict=False):
            whole = known(value)
            if whole is None:
                yield None
            else:
                sizes = list(whole[0])
                del sizes[axis]
                yield tuple(sizes), whole[1]


def _inferred(body: ir.Graph, model: ir.Model, shapes: Shapes) -> dict[str, Known]:
    """Every value of a body whose shape is fixed by what is known around it."""
    graph = ir.serde.serialize_graph(body)
    own = {info.name for info in graph.input} | {name for node in graph.node for name in node.output}
    own |= {tensor.name for tensor in graph.initializer}
    del graph.value_info[:]
    declared = [info.name for info in graph.input]
    del graph.input[:]
    read = [name for node in graph.node for name in node.input if name and name not in own]
    for name in dict.fromkeys([*declared, *read]):
        if name in shapes.sizes and name in shapes.types:
            graph.input.append(
                onnx.helper.make_tensor_value_info(name, shapes.types[name], list(shapes.sizes[name]))
            )
    for info in graph.output:
        info.type.tensor_type.ClearField("shape")
    proto = onnx.ModelProto(ir_version=max(model.ir_version or 0, 4), graph=graph)
    for domain, version in model.opset_imports.items():
        proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    found: dict[str, Known] = {}
    for info in (*graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[info.name] = tuple(dim.dim_value for dim in tensor.shape.dim), tensor.elem_type
    for tensor in graph.initializer:
        found[tensor.name] = tuple(tensor.dims), tensor.data_type
    return found
