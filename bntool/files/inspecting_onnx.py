"""A look at an ONNX file: opsets, inputs and outputs, its nodes counted, its tensors, its external data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bntool.core.errors import LoadError
from bntool.files.looking import Found, TensorRow
from bntool.files.onnx_data import Fault, fault_of, require_data
from bntool.files.security.pickled_calls import shown

_MAX_DEPTH = 30


def look_at_onnx(path: Path, found: Found) -> None:
    """Fill `found` from the model's structure; external data is measured, not read."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graphs = list(_graphs(model.graph))
    nodes = Counter(
        f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for graph in graphs
        for node in graph.node
    )
    found.facts |= {
        "ir_version": model.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "producer": shown(f"{model.producer_name} {model.producer_version}".strip()),
        "inputs": {shown(v.name): _type(v) for v in _inputs(model.graph)},
        "outputs": {shown(v.name): _type(v) for v in model.graph.output},
        "nodes": {shown(kind): number for kind, number in nodes.most_common()},
        "functions": [shown(f.name) for f in model.functions],
        "metadata": {shown(p.key): shown(p.value) for p in model.metadata_props},
    }
    external: dict[str, int] = {}
    problems: list[Fault] = []
    for graph in graphs:
        for tensor in graph.initializer:
            found.tensors.append(_row(tensor))
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                problem = _look_outside(path, tensor, external, found)
                problems += [problem] if problem is not None else []
    if external:
        found.facts["external_data"] = external
    if problems and (problems[0].cut or not found.suspicious):
        raise LoadError(f"{path.name} {problems[0].what}", where=str(path), next_step=problems[0].next_step)


def _graphs(graph: Any, depth: int = 0) -> Iterator[Any]:
    """The graph and every graph inside of its nodes."""
    yield graph
    if depth < _MAX_DEPTH:
        for node in graph.node:
            for attribute in node.attribute:
                for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                    yield from _graphs(inner, depth + 1)


def _inputs(graph: Any) -> list[Any]:
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def _type(value: Any) -> str:
    """`FLOAT 1x3x224x224`, open axes by their names."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value") or "unknown")
    axes = [
        shown(d.dim_param) or "?" if not d.HasField("dim_value") else str(d.dim_value)
        for d in tensor.shape.dim
    ]
    return f"{_dtype(tensor.elem_type)} {'x'.join(axes)}".strip()


def _dtype(number: int) -> str:
    import onnx

    known = number in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(number)) if known else f"type {number}"


def _item_bytes(number: int) -> int:
    import onnx

    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(number).itemsize)
    except (KeyError, TypeError, ValueError):
        return 1


def _row(tensor: Any) -> TensorRow:
    shape = tuple(max(int(n), 0) for n in tensor.dims)
    return TensorRow.of(shown(tensor.name), _dtype(tensor.data_type), shape, _item_bytes(tensor.data_type))


def _look_outside(path: Path, tensor: Any, external: dict[str, int], found: Found) -> Fault | None:
    """External data stands in a file beside the model, and has as many bytes as the tensor takes.

    Gives what is in the way of reading it though the model is honest: it was copied without its data.
    """
    fault = fault_of(path, tensor)
    if fault is None:
        data = require_data(path, tensor)
        external[shown(str(data.relative_to(path.parent)))] = data.stat().st_size
    elif fault.suspicious:
        found.suspect(fault.what)
    return None if fault is None or (fault.suspicious and not fault.cut) else fault
