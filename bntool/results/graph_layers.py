"""The layers of what is a graph: one row for each layer that holds numbers, with its shapes and mult-adds.

An exported program and an ONNX file are told by their graph alone, and so are the layers inside TorchScript.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bntool.graph.dataflow import Graph, Op, Value
from bntool.results.layers import Layer, total
from bntool.results.tensor_layers import Found, Kind, Size, StoredTensor, rows_of
from bntool.results.walking import Call

if TYPE_CHECKING:
    from bntool.observe.exported_program import ProgramObservation
    from bntool.observe.onnx_model import OnnxObservation


def of_program(observed: ProgramObservation) -> Found:
    """A program's layers and tensors, and its BatchNorms, those in a control-flow operator included."""
    tensors = _program_tensors(observed.program)
    owners = {tensor.name: tensor.name.rpartition(".")[0] for tensor in tensors}
    norms = len(observed.norms) + len(observed.hidden)
    return _found(observed.graph, tensors, owners, norms, observed.open)


def _program_tensors(program: ExportedProgram) -> list[StoredTensor]:
    buffers, seen, tensors = set(program.graph_signature.buffers), set(), []
    for name, value in {**program.state_dict, **program.constants}.items():
        if not isinstance(value, Tensor):
            continue
        again = id(value) in seen
        seen.add(id(value))
        kind: Kind = "buffer" if name in buffers else "constant"
        if isinstance(value, nn.Parameter):
            kind = "trainable" if value.requires_grad else "frozen"
        tensors.append(_stored(name, kind, value, again))
    return tensors


def _stored(name: str, kind: Kind, tensor: Tensor, again: bool = False) -> StoredTensor:
    elements = 0 if again else tensor.numel()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(name, kind, tuple(tensor.shape), dtype, elements, elements * tensor.element_size())


def of_onnx(observed: OnnxObservation) -> Found:
    """A file's layers, its stored tensors and its BatchNormalizations, those in bodies included."""
    from bntool.observe.onnx_nodes import labels_of, stored_tensors

    labels = labels_of(observed.model)
    scopes = _scopes(observed)
    stored = stored_tensors(observed.model)
    readers = {name: _reader(value, labels) for name, (value, _) in stored.items()}
    names: dict[str, str] = {}  # scope -> its module, where the name of its weight tells that
    for name, (scope, _) in readers.items():
        head, _, last = name.rpartition(".")
        if head and last == "weight":
            names.setdefault(scopes.get(name, scope), head)
    tensors, owners = [], {}
    for name, (scope, is_statistic) in readers.items():
        held = stored[name][1]
        at = scopes.get(name, scope)
        owners[name] = names.get(at) or (layer_name(at) if at else name.rpartition(".")[0])
        kind: Kind = "frozen" if held.dtype.is_floating_point() else "constant"
        shape = tuple(int(n) for n in held.shape.numpy())
        dtype, kind = held.dtype.name.lower(), "buffer" if is_statistic else kind
        tensors.append(StoredTensor(name, kind, shape, dtype, int(held.size), int(held.nbytes)))
    norms = len(observed.norms) + len(observed.hidden)
    found = _found(observed.graph, tensors, owners, norms, observed.open, names)
    said = "an ONNX file does not say what is trained: its numbers are told as frozen, statistics as buffers"
    return dataclasses.replace(found, notes=(*found.notes, said))


def _scopes(observed: OnnxObservation) -> dict[str, str]:
    """By initializer, the layer that reads it as weight or bias: a MatMul has its bias in another node."""
    return {
        str(value.name): scope
        for scope, layer in observed.layers.items()
        for call in layer.calls
        for value in (call.weight, call.bias)
        if value is not None
    }


def _reader(value: Any, labels: Mapping[Any, str]) -> tuple[str, bool]:
    """The node that reads an initializer, and whether it reads it as a running statistic."""
    for use in value.uses():
        node = use.node
        if node.op_type == "Identity" and node.outputs[0].uses():  # how an exporter shares equal numbers
            return _reader(node.outputs[0], labels)
        if node in labels:
            return labels[node], node.op_type == "BatchNormalization" and use.idx > 2
    return "", False


def layer_name(scope: str) -> str:
    """The module in the name of a node: `/layer1/conv1/Conv` and `layer1.conv1/Conv` are `layer1.conv1`."""
    head, slash, _ = scope.rpartition("/")
    parts = [part for part in head.split("/") if part] if slash else []
    # `/layer1/layer1.0/conv1/Conv` repeats what is around
    names = [
        part for i, part in enumerate(parts) if not any(p.startswith(f"{part}.") for p in parts[i + 1 :])
    ]
    return ".".join(names) or scope


# -- rows -------------------------------------------------------------------------------------------------


def _found(
    graph: Graph,
    tensors: Sequence[StoredTensor],
    owners: Mapping[str, str],
    norms: int,
    is_open: bool,
    names: Mapping[str, str] | None = None,
) -> Found:
    seen: dict[str, Layer] = {}
    names = names or {}
    for op in graph.ops:
        if _handles(graph, op):
            name = names.get(op.scope) or layer_name(op.scope)
            seen[name] = _with_call(seen.get(name), name, graph, op)
    given = [
        value
        for value in graph.values
        if value.producer is None and not value.constant and not value.handle and value.readers
    ]
    notes = ("axes that are left open were given sizes, which the shapes here show",) if is_open else ()
    rows = tuple(rows_of(seen, tensors, owners))
    return Found(rows, tuple(tensors), norms, tuple(v.shape for v in given), sum(map(_bytes, given)), notes)


def calls_by_tensors(graph: Graph) -> dict[str, Call]:
    """By module, the calls that its tensors tell: inside TorchScript no hook sees where one is made."""
    seen: dict[str, Layer] = {}
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for op in graph.ops:
        for handle in _handles(graph, op)[:1]:
            name = handle.rpartition(".")[0]
            seen[name] = _with_call(seen.get(name), name, graph, op)
            counts[name] += first.setdefault(name, handle) == handle
    return {
        name: Call(
            layer.input_shape,
            layer.output_shape,
            count=counts[name],
            kernel=layer.kernel,
            mult_adds=layer.mult_adds or 0,
            output_bytes=layer.output_bytes or 0,
        )
        for name, layer in seen.items()
    }


def _handles(graph: Graph, op: Op) -> list[str]:
    """The stored tensors that an operation reads."""
    return [graph.values[value].handle for value in op.inputs.values() if graph.values[value].handle]


def _with_call(layer: Layer | None, name: str, graph: Graph, op: Op) -> Layer:
    """One more op of a layer: the figures of its product, and what comes out at last."""
    given = graph.values[op.inputs["input"]].shape if "input" in op.inputs else None
    out = graph.output(op).shape if op.outputs else None
    weight = graph.values[op.inputs["weight"]].shape if "weight" in op.inputs else ()
    layer = layer or Layer(0, name, _type_of(op, len(given or ())), given, out)
    return dataclasses.replace(
        layer,
        mult_adds=total(layer.mult_adds, _mult_adds(op, weight, given or (), out or ())),
        output_bytes=total(layer.output_bytes, _bytes(graph.output(op)) if op.outputs else None),
        kernel=tuple(weight[2:]) if op.kind == "conv" else layer.kernel,
    )


def _bytes(value: Value) -> int:
    """Of a value of a graph; a type that torch has not is taken for float32."""
    dtype = getattr(torch, value.dtype.rpartition(".")[2].lower(), torch.float32)
    return math.prod(value.shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)


def _type_of(op: Op, axes: int) -> str:
    if op.kind == "conv":
        return f"Conv{'Transpose' * bool(op.attrs.get('transposed'))}{op.attrs['dims']}d"
    if op.kind == "batch_norm":
        return f"BatchNorm{max(axes - 2, 1)}d"
    return "Linear" if op.kind in ("linear", "matmul") else op.kind


def _mult_adds(op: Op, weight: Size, given: Size, out: Size) -> int:
    """As of a module: every weight once at each place, the parameters of a BatchNorm once for each sample."""
    bias = weight[0] if "bias" in op.inputs and weight else 0
    if op.kind == "conv":
        turned = op.attrs.get("transposed")
        bias = out[1] if "bias" in op.inputs else 0
        stands, places = (given if turned else out), math.prod(out[:1]) * math.prod(out[2:])
        return math.prod(stands[:1]) * math.prod(stands[2:]) * math.prod(weight) + places * bias
    if op.kind in ("linear", "matmul"):
        return math.prod(out[:-1]) * (math.prod(weight) + (out[-1] if "bias" in op.inputs and out else 0))
    if op.kind == "batch_norm":
        return math.prod(given[:1]) * (math.prod(weight) + bias)
    return 0
