"""Rarer ways of writing the same ONNX graph, brought into the one form that the rest of bntool reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

_ALIAS = "ai.onnx"


def to_one_form(proto: onnx.ModelProto) -> None:
    """Change the message itself: `ai.onnx` is the empty domain, a sparse tensor is written out, and an axis
    of negative size is one that is left open.

    Runtimes take both forms alike; ONNX's own checker and reader know only this one.
    """
    _name_the_domain(proto)
    for nodes in (*(graph.node for graph in _graphs(proto)), *(f.node for f in proto.functions)):
        for node in nodes:
            _write_out_constant(node)
    for graph in _graphs(proto):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        for info in (*graph.input, *graph.output, *graph.value_info):
            for dim in info.type.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.ClearField("dim_value")


def inline_functions(model: ir.Model) -> None:
    """Put the body of each local function where it is called: nothing moves through a call.

    One of other opsets than the model's stays a call.
    """
    from onnx_ir.passes import common

    def fits(function: ir.Function) -> bool:
        own = function.opset_imports.items()
        return all(model.opset_imports.get(domain, version) == version for domain, version in own)

    if model.functions:
        common.InlinePass(criteria=fits)(model)


def name_apart(model: ir.Model) -> None:
    """No two values of a model with bodies have one name: those of If may, in the format."""
    from onnx_ir.passes import common

    if len(list(model.graphs())) > 1:
        common.NameFixPass()(model)


def take_off_inputs(model: ir.Model) -> None:
    """Initializers that are listed among the inputs, for a caller to replace, become constants."""
    model.graph.inputs[:] = [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def _name_the_domain(proto: onnx.ModelProto) -> None:
    named = [opset for opset in proto.opset_import if opset.domain == _ALIAS]
    if not named:
        return
    plain = any(not opset.domain for opset in proto.opset_import)
    kept = [opset for opset in proto.opset_import if opset.domain != _ALIAS]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    if not plain:
        proto.opset_import.add(domain="", version=named[0].version)
    for function in proto.functions:
        for opset in function.opset_import:
            opset.domain = "" if opset.domain == _ALIAS else opset.domain


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph, and every body in it or in a function."""
    waiting: list[Any] = [proto.graph]
    nodes: list[Any] = [node for function in proto.functions for node in function.node]
    while waiting or nodes:
        if waiting:
            graph = waiting.pop()
            nodes += graph.node
            yield graph
            continue
        for attribute in nodes.pop().attribute:
            waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _write_out_constant(node: onnx.NodeProto) -> None:
    node.domain = "" if node.domain == _ALIAS else node.domain
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            tensor = _dense(attribute.sparse_tensor)
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """The same numbers with the zeros between; indices count the elements, or give a coordinate each."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), dtype=values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return numpy_helper.from_array(dense, sparse.values.name)
