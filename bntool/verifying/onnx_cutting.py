"""Cut an ONNX graph: up to some node, between known values and one value, or all that one value needs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

from bntool.core.blame import Step
from bntool.files.onnx_data import whole_proto
from bntool.graph.inputs import Inputs

_ELEMENTS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}


@dataclasses.dataclass(frozen=True)
class Cut:
    """Part of a graph as a model of its own."""

    model: onnx.ModelProto

    @property
    def inputs(self) -> list[str]:
        return [info.name for info in self.model.graph.input]

    def typed(self, feeds: Mapping[str, Tensor]) -> Cut:
        """The same with the types and sizes of what its inputs will be fed."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for info in model.graph.input:
            tensor = feeds[info.name]
            kind = _ELEMENTS[tensor.dtype]
            info.CopyFrom(helper.make_tensor_value_info(info.name, kind, list(tensor.shape)))
        return Cut(model)

    def write(self, path: Path) -> None:
        path.write_bytes(self.model.SerializeToString())


class OnnxGraph:
    """The nodes of a file as steps in their order, and its values, `maker` of each included."""

    def __init__(self, path: str | Path) -> None:
        self._proto = whole_proto(path)
        graph = self._proto.graph
        self._stored = {tensor.name for tensor in graph.initializer}
        self._stored |= {tensor.values.name for tensor in graph.sparse_initializer}
        self._fed = [info.name for info in graph.input if info.name not in self._stored]
        self.outputs = tuple(info.name for info in graph.output)
        self.steps = tuple(_step(node, i) for i, node in enumerate(graph.node))
        self.maker = {value: step for step in self.steps for value in step.gives}
        self.values = tuple(self.maker)
        self._types = {info.name: info for info in (*_inferred(self._proto), *graph.output)}
        self._not_tensors = {
            name
            for name, info in self._types.items()
            if info.type.WhichOneof("value") not in (None, "tensor_type")
        }

    def fed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The file's inputs by its own names: matched by name, else in order."""
        given = inputs.tensors()
        if set(self._fed) <= set(given):
            return {name: given[name] for name in self._fed}
        return dict(zip(self._fed, given.values(), strict=True))

    def prefix(self, count: int, outputs: Sequence[str] | None = None) -> Cut:
        """The first `count` nodes, which return what the rest reads, or `outputs`."""
        made = [value for step in self.steps[:count] for value in step.gives]
        if outputs is None:
            later = {value for step in self.steps[count:] for value in step.reads} | set(self.outputs)
            outputs = [value for value in made if value in later]
        return self._cut(range(count), self._fed, [v for v in outputs if v not in self._not_tensors])

    def ancestors(self, value: str) -> Cut:
        """All that one value is made of."""
        return self.between((), value)

    def between(self, known: Collection[str], value: str) -> Cut:
        """The nodes from values that are known to one value, which is not."""
        index = {v: i for i, step in enumerate(self.steps) for v in step.gives}
        wanted, nodes = [value], set()
        boundary: dict[str, None] = {}
        while wanted:
            name = wanted.pop()
            if name in self._stored:
                continue
            if name != value and (name in known or name not in index):
                boundary[name] = None
            elif index[name] not in nodes:
                nodes.add(index[name])
                wanted += self.steps[index[name]].reads
        return self._cut(sorted(nodes), list(boundary), [value])

    def values_of_scopes(self, layers: Collection[str]) -> dict[str, str]:
        """Layer -> the value that its nodes give to others, where nodes are named `LAYER/OP`."""
        scope = {step.name: step.name.rpartition("/")[0] for step in self.steps}
        found: dict[str, str] = {}
        for step in self.steps:
            layer = scope[step.name]
            if layer in layers and step.gives and step.gives[0] not in self._not_tensors:
                found[layer] = step.gives[0]
        return found

    def _cut(self, nodes: Sequence[int], inputs: Sequence[str], outputs: Sequence[str]) -> Cut:
        graph = self._proto.graph
        used = {value for i in nodes for value in self.steps[i].reads}
        part = onnx.GraphProto(name="cut")
        part.node.extend(graph.node[i] for i in nodes)
        part.initializer.extend(t for t in graph.initializer if t.name in used)
        part.sparse_initializer.extend(t for t in graph.sparse_initializer if t.values.name in used)
        part.input.extend(onnx.ValueInfoProto(name=name) for name in inputs)
        part.output.extend(self._types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
        for info in part.output:
            info.type.tensor_type.ClearField("shape")
        model = onnx.ModelProto()
        model.CopyFrom(onnx.ModelProto(ir_version=self._proto.ir_version))
        model.opset_import.extend(self._proto.opset_import)
        model.functions.extend(self._proto.functions)
        model.graph.CopyFrom(part)
        return Cut(model)


def _step(node: Any, index: int) -> Step:
    reads = dict.fromkeys([*node.input, *_captured(node)])
    reads.pop("", None)
    gives = tuple(name for name in node.output if name)
    return Step(node.name or f"node {index} ({', '.join(gives)})", node.op_type, tuple(reads), gives)


def _captured(node: Any) -> Iterator[str]:
    """What the graphs inside a node (If, Loop, Scan) read from outside."""
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            inside = {t.name for t in graph.initializer} | {i.name for i in graph.input}
            inside |= {value for inner in graph.node for value in inner.output}
            for inner in graph.node:
                yield from (v for v in (*inner.input, *_captured(inner)) if v and v not in inside)
            yield from (o.name for o in graph.output if o.name not in inside)


def _inferred(proto: onnx.ModelProto) -> list[Any]:
    """Every value's type as far as ONNX tells it."""
    try:
        return list(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    except Exception:  # noqa: BLE001 - a model too large for one message, or whose shapes contradict
        return list(proto.graph.value_info)


def node_that(path: Path, fails: Callable[[Path], bool]) -> str:
    """The name and kind of the first node with which the graph fails, by ever shorter parts of it."""
    graph = OnnxGraph(path)
    good, bad = 0, len(graph.steps)
    with tempfile.TemporaryDirectory(prefix="bntool.") as folder:
        part = Path(folder) / "part.onnx"
        while bad - good > 1:
            middle = (good + bad) // 2
            graph.prefix(middle).write(part)
            good, bad = (good, middle) if fails(part) else (middle, bad)
    step = graph.steps[bad - 1]
    return f"at {step.name}, {step.kind}"
