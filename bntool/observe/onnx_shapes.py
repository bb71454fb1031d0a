"""Concrete shapes for an ONNX graph, by ONNX's own shape inference with every open size fixed.

A dynamic axis has no size, and laws need one. So each symbol is given a size that nothing else in the graph
is likely to have, on a copy without weights. There are two sets of sizes: whoever plans with both, and gets
the same plan, has not relied on a size that is not fixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx
import onnx_ir as ir
import torch

_BATCH = (2, 3)
_PRIMES = ((7, 11, 17, 23, 31), (13, 19, 29, 37, 41))
"""Sizes of other open axes are 32 times a prime: halving and doubling them, as networks do, stays exact."""
_UNKNOWN = (1_009, 5_003)
"""Sizes that inference cannot tell are counted up from here, so that no two of them are taken for equal."""
_SMALL = 1 << 10

DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}
"""The types that a fold can pass; every other type is named as ONNX names it."""


@dataclasses.dataclass
class Shapes:
    """Shape and type (ONNX's code) of every value of the main graph, by name.

    `open` tells whether any size was made up, or is that of one run. `unsure` names the values whose sizes
    nobody knows.
    """

    sizes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    open: bool
    unsure: set[str] = dataclasses.field(default_factory=set)

    def of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return None if value is None else self.sizes.get(str(value.name))

    def dtype(self, name: str) -> str:
        """`torch.float32` for the floating types that a fold can pass, else ONNX's own name."""
        code = self.types.get(name, onnx.TensorProto.UNDEFINED)
        own = onnx.TensorProto.DataType.Name(code).lower()
        return str(DTYPES.get(code, own.replace("float", "small_float")))


class Seen(Protocol):
    """What runs of the model tell of its sizes; `asked`: the user said what it is run on."""

    asked: bool

    def lengths(self, which: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of every input in a run, by name; nothing where there is none."""

    def shapes(self, which: int, names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        """The shapes of these values in a run."""


def sizes_of(model: ir.Model, which: int = 0, seen: Seen | None = None) -> Shapes:
    """Every shape under the first (0) or the second (1) set of sizes for the open axes.

    Inference is a first guess, on sizes that nothing else in the graph is likely to have. Where it gives up,
    or the user said on what sizes, it is made on those of a run, and the rest is seen in that run.
    """
    lengths = seen.lengths(which) if seen is not None and seen.asked else {}
    shapes = infer(model, which, lengths)
    if not shapes.unsure or seen is None:
        return shapes
    lengths = lengths or seen.lengths(which)
    if lengths:
        shapes = infer(model, which, lengths)
        shapes.sizes.update(seen.shapes(which, sorted(shapes.unsure)))
        shapes.unsure -= shapes.sizes.keys()
        shapes.open = True
    return shapes


def infer(model: ir.Model, which: int = 0, lengths: Mapping[str, tuple[int, ...]] | None = None) -> Shapes:
    """Infer every shape under a set of sizes for the open axes, or where the inputs have these `lengths`."""
    table = _Sizes(which)
    skeleton = _skeleton(model, table, lengths or {})
    shapes = Shapes({}, {}, False)
    inferred = _inferred(skeleton)
    graph = _inferred(_with_computed_shapes(skeleton)).graph if _has_holes(inferred) else inferred.graph
    # what was carried out is no node any more
    left = {output for node in graph.node for output in node.output}
    gone = (info for info in inferred.graph.value_info if info.name not in left and _is_known(info))
    for info in (*graph.input, *graph.value_info, *graph.output, *gone):
        _read(info, shapes, table)
    for tensor in (*skeleton.graph.initializer, *graph.initializer):
        shapes.sizes[tensor.name] = tuple(tensor.dims)
        shapes.types[tensor.name] = tensor.data_type
    known = shapes.sizes.keys() - shapes.unsure
    made = {str(v.name) for node in model.graph if node.op_type != "Constant" for v in node.outputs if v.name}
    shapes.unsure = made - known - _no_tensors(graph)
    shapes.open = table.used
    return shapes


def _no_tensors(graph: onnx.GraphProto) -> set[str]:
    return {i.name for i in graph.value_info if i.type.WhichOneof("value") not in (None, "tensor_type")}


class _Sizes:
    """The size of each open axis, the same for the same symbol."""

    def __init__(self, which: int) -> None:
        self.which = which
        self.known: dict[str, int] = {}
        self.others = 0
        self.unknown = _UNKNOWN[which]
        self.used = False

    def of_input(self, symbol: str, axis: int) -> int:
        self.used = True
        if symbol in self.known:
            return self.known[symbol]
        batches = sum(size < 32 for size in self.known.values())
        if axis == 0 and not batches:
            size = _BATCH[self.which]
        else:
            primes = _PRIMES[self.which]
            size = 32 * primes[self.others % len(primes)]
            self.others += 1
        if symbol:
            self.known[symbol] = size
        return size

    def of_result(self, symbol: str) -> int:
        self.used = True
        if symbol and symbol in self.known:
            return self.known[symbol]
        self.unknown += 1
        if symbol:
            self.known[symbol] = self.unknown
        return self.unknown


def _skeleton(model: ir.Model, table: _Sizes, lengths: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model without its weights, and with its open input axes fixed."""
    proto = onnx.ModelProto(ir_version=max(model.ir_version or 0, 4))
    for domain, version in model.opset_imports.items():
        proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    known = {**asked_shapes(model), **lengths}
    for value in model.graph.inputs:
        graph.input.append(_input_info(value, known.get(str(value.name)), model, table))
    inputs = {info.name for info in graph.input}
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        if tensor is not None and tensor.size <= _SMALL:
            copy = ir.serde.serialize_tensor(ir.Tensor(tensor.numpy(), name=name, dtype=tensor.dtype))
            graph.initializer.append(copy)
        elif tensor is not None and name not in inputs:
            graph.input.append(
                onnx.helper.make_tensor_value_info(name, int(tensor.dtype), list(tensor.shape.numpy()))
            )
    for node in model.graph:
        graph.node.append(ir.serde.serialize_node(node))
        if node.domain not in ("", "ai.onnx"):
            # Nobody can infer these: what the file says of them is all there is, and what their readers ask.
            told = (_fixed(v, table) if v.shape is not None else _asked(v) for v in node.outputs if v.name)
            graph.value_info.extend(info for info in told if info is not None)
    for value in model.graph.outputs:
        if value in model.graph.inputs:
            continue  # an output without a shape would take the input's away
        info = ir.serde.serialize_value(value)
        info.type.tensor_type.ClearField("shape")
        graph.output.append(info)
    return proto


def _input_info(
    value: ir.Value, known: Sequence[int | None] | None, model: ir.Model, table: _Sizes
) -> onnx.ValueInfoProto:
    info = ir.serde.serialize_value(value)
    shape = info.type.tensor_type.shape
    if known is not None:
        table.used |= value.shape is None or not value.shape.is_static()
        del shape.dim[len(known) :]
        for axis, length in enumerate(known):
            dim = shape.dim[axis] if axis < len(shape.dim) else shape.dim.add()
            if length is not None:
                dim.dim_value = length
    if value.name not in model.graph.initializers:
        for axis, dim in enumerate(shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = table.of_input(dim.dim_param, axis)
    return info


def _fixed(value: ir.Value, table: _Sizes) -> onnx.ValueInfoProto:
    info = ir.serde.serialize_value(value)
    for dim in info.type.tensor_type.shape.dim:
        if not dim.HasField("dim_value") and dim.dim_param in table.known:
            dim.dim_value = table.known[dim.dim_param]
    return info


def _asked(value: ir.Value) -> onnx.ValueInfoProto | None:
    """What a convolution that reads a value asks of it: its rank, and its channels."""
    for node, index in value.uses():
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        tensor = weight.const_value if weight is not None else None
        if node.op_type in ("Conv", "ConvTranspose") and index == 0 and tensor is not None:
            sizes = [int(n) for n in tensor.shape.numpy()]
            group = int(node.attributes.get_int("group", 1) or 1)
            channels = sizes[0] if node.op_type == "ConvTranspose" else sizes[1] * group
            dims: list[Any] = [None, channels, *([None] * (len(sizes) - 2))]
            return onnx.helper.make_tensor_value_info(str(value.name), int(tensor.dtype), dims)
    return None


def asked_shapes(model: ir.Model) -> dict[str, list[int | None]]:
    """The shape of each input that leaves its channels or its rank open, as the layer that reads it asks."""
    found: dict[str, list[int | None]] = {}
    for value in model.graph.inputs:
        told = None if value.shape is None else [n if isinstance(n, int) else None for n in value.shape]
        untold = told is None or (len(told) > 1 and told[1] is None)
        asked = _asked(value) if untold and value.name not in model.graph.initializers else None
        if asked is not None:
            dims = [d.dim_value or None for d in asked.type.tensor_type.shape.dim]
            found[str(value.name)] = [n or m for n, m in zip(told or dims, dims, strict=False)]
    return found


def _inferred(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return skeleton


def _has_holes(inferred: onnx.ModelProto) -> bool:
    """Whether some result has an unknown size or none at all."""
    known = {info.name for info in (*inferred.graph.value_info, *inferred.graph.output) if _is_known(info)}
    return any(
        name and name not in known
        for node in inferred.graph.node
        if node.op_type != "Constant"
        for name in node.output
    )


def _is_known(info: onnx.ValueInfoProto) -> bool:
    tensor = info.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def _with_computed_shapes(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """The skeleton with arithmetic on sizes carried out, which ONNX's own inference does only in part."""
    from onnxscript.optimizer import fold_constants

    try:
        model = ir.from_proto(skeleton)
        fold_constants(model, onnx_shape_inference=True, should_fold=_is_short_constant)
        computed = ir.to_proto(model)
    except Exception:  # noqa: BLE001  a help only: without it some sizes stay unknown, and nothing moves there
        return skeleton
    wanted = {name for node in skeleton.graph.node for name in node.output}
    infos = [info for info in computed.graph.value_info if info.name in wanted]
    del computed.graph.value_info[:]
    computed.graph.value_info.extend(infos)
    return computed


def _is_short_constant(node: ir.Node) -> bool | None:
    """A ConstantOfShape, which onnxscript leaves alone unless asked: the amounts of a Pad are made by it."""
    shape = node.inputs[0] if node.op_type == "ConstantOfShape" else None
    tensor = ir.convenience.get_const_tensor(shape) if shape is not None else None
    return True if tensor is not None and math.prod(tensor.numpy().tolist()) <= _SMALL else None


def _read(info: onnx.ValueInfoProto, shapes: Shapes, table: _Sizes) -> None:
    tensor = info.type.tensor_type
    if tensor.elem_type:
        shapes.types[info.name] = tensor.elem_type
    if tensor.HasField("shape"):
        if not _is_known(info):
            shapes.unsure.add(info.name)
        shapes.sizes[info.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else table.of_result(dim.dim_param)
            for dim in tensor.shape.dim
        )
