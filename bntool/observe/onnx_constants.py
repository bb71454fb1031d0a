"""What of an ONNX graph is constant, and its numbers: initializers, Constant nodes, and ops on those."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

_FOLDABLE = frozenset(
    """Identity Constant ConstantOfShape Shape Size Cast CastLike Transpose Expand Reshape Flatten Squeeze
    Unsqueeze Concat Slice Split Gather Tile Pad Range Add Sub Mul Div Sum Sqrt Reciprocal Neg Abs Pow Exp Log
    Max Min Floor Ceil Mod ReduceProd ReduceSum ReduceMean ReduceSumSquare ReduceL2 ReduceMax ReduceMin Where
    Equal""".split()
)
"""Ops that always give the same numbers for the same numbers, and have no body."""

_OF_SIZES = frozenset({"Shape", "Size"})
_NO_NUMPY = {"bfloat16": (np.int16, torch.bfloat16)}


class Sizes(Protocol):
    """Shapes and types (ONNX's codes) of values by name; of some in `unsure` the sizes are made up."""

    sizes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    unsure: set[str]


class Constants:
    """The constant values of a graph, computed when they are asked for.

    What is computed from sizes alone (Shape, Gather, Concat) has numbers too where `shapes` knows them, and
    is no constant: other inputs give others.

    An initializer that is also a graph input is a default that the caller may replace, from IR version 4
    on: it is no constant.
    """

    def __init__(self, model: ir.Model, shapes: Sizes) -> None:
        self.shapes = shapes
        self.version = model.opset_imports.get("", 1)
        self.replaceable: set[int] = set()
        if (model.ir_version or 0) >= 4:
            inputs = {id(v) for v in model.graph.inputs}
            self.replaceable = {id(v) for v in model.graph.initializers.values() if id(v) in inputs}
        self.known: dict[int, Any] = {}
        self.ids = {
            id(v)
            for graph in model.graphs()
            for v in graph.initializers.values()
            if v.const_value is not None and id(v) not in self.replaceable
        }
        self.sized: set[int] = set()
        for node in model.graph.all_nodes():
            if node.domain in ("", "ai.onnx"):
                self._look_at(node)

    def _look_at(self, node: ir.Node) -> None:
        # Of the second operand of CastLike only the type is read.
        read = [
            id(v) for v in (node.inputs[:1] if node.op_type == "CastLike" else node.inputs) if v is not None
        ]
        made = [id(v) for v in node.outputs]
        folds = node.op_type in _FOLDABLE or node.op_type == "DequantizeLinear"
        if folds and all(v in self.ids for v in read):
            self.ids.update(made)
        elif node.op_type in _OF_SIZES:
            self.sized.update(made if self._size_is_known(node.inputs[0]) else ())
        elif folds and all(v in self.ids or v in self.sized for v in read):
            self.sized.update(made)

    def _size_is_known(self, value: ir.Value | None) -> bool:
        name = "" if value is None else str(value.name)
        return name in self.shapes.sizes and name not in self.shapes.unsure

    def __contains__(self, value: ir.Value | None) -> bool:
        return value is not None and id(value) in self.ids

    def array(self, value: ir.Value | None) -> Any:
        """The numbers of a value as a numpy array, those computed from sizes too; None where not known."""
        if value is None or not (id(value) in self.ids or id(value) in self.sized):
            return None
        if id(value) not in self.known:
            if value.const_value is not None:
                return value.const_value.numpy()
            producer = value.producer()
            assert producer is not None
            self._compute(producer)
        return self.known[id(value)]

    def tensor(self, value: ir.Value | None) -> Tensor | None:
        """The numbers as a torch tensor, which may share their memory: only to be read.

        The integers behind a DequantizeLinear stand for its output, so that nobody takes it for a weight
        that can be edited.
        """
        if value is not None and self.is_dequantized(value):
            producer = value.producer()
            value = producer.inputs[0] if producer is not None else None
        array = self.array(value) if value in self else None
        return None if array is None else to_torch(array)

    def is_dequantized(self, value: ir.Value) -> bool:
        producer = value.producer()
        return id(value) in self.ids and producer is not None and producer.op_type == "DequantizeLinear"

    def integers(self, value: ir.Value | None) -> list[int] | None:
        array = self.array(value)
        return None if array is None else [int(n) for n in np.asarray(array).reshape(-1)]

    def _compute(self, node: ir.Node) -> None:
        results: list[Any] = [None] * len(node.outputs)
        if node.op_type in _OF_SIZES:
            results = [self._size(node)]
        elif node.op_type == "CastLike":
            results = [self._cast_like(node)]
        elif node.op_type != "DequantizeLinear":
            feed = {str(value.name): self.array(value) for value in node.inputs if value is not None}
            if all(array is not None for array in feed.values()):
                results = _evaluate(node, feed, self.version) or results
        for value, result in zip(node.outputs, results, strict=True):
            self.known[id(value)] = result

    def _size(self, node: ir.Node) -> Any:
        shape = self.shapes.sizes[str(node.inputs[0].name)] if node.inputs[0] is not None else ()
        if node.op_type == "Size":
            return np.array(math.prod(shape), dtype=np.int64)
        start, end = (
            node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", None))
        )
        return np.array(shape[start:end], dtype=np.int64)

    def _cast_like(self, node: ir.Node) -> Any:
        array, like = self.array(node.inputs[0]), node.inputs[1]
        code = self.shapes.types.get(str(like.name)) if like is not None else None
        return None if array is None or code is None else array.astype(ir.DataType(code).numpy())


def _evaluate(node: ir.Node, feed: dict[str, Any], version: int) -> list[Any] | None:
    """One node by ONNX's own reference implementation."""
    info = onnx.helper.make_tensor_value_info
    outputs = [str(v.name) for v in node.outputs]
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node)],
        "constant",
        [info(name, onnx.TensorProto.FLOAT, None) for name in feed],
        [info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feed)]
    except Exception:  # noqa: BLE001  whatever it cannot compute is a constant whose numbers are not known
        return None


def to_torch(array: Any) -> Tensor | None:
    """A numpy array as a tensor on the same memory; None for types that torch does not have."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    with warnings.catch_warnings():
        # Files are mapped read-only, and these tensors are only read.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        try:
            if array.dtype.name in _NO_NUMPY:
                bits, dtype = _NO_NUMPY[array.dtype.name]
                return torch.from_numpy(array.view(bits)).view(dtype)
            return torch.from_numpy(array)
        except TypeError:
            return None


def to_onnx(tensor: Tensor, name: str, doc: str | None = None) -> ir.Tensor[Any]:
    """A torch tensor as an ONNX tensor of the same type."""
    array: Any = tensor.detach().cpu().contiguous()
    if array.dtype == torch.bfloat16:
        import ml_dtypes

        return ir.Tensor(array.view(torch.int16).numpy().view(ml_dtypes.bfloat16), name=name, doc_string=doc)
    return ir.Tensor(array.numpy(), name=name, doc_string=doc)
