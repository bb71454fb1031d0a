"""Which BatchNorms a model still computes, found by value, whatever a tool has made of names and ops.

A BatchNorm is y = s·x + t with s = γ/√(σ²+ε). Statistics and affine are random, so the numbers of s name the
layer: where a graph still multiplies by s, as a BatchNormalization, a Mul, an OpenVINO Multiply or a 1×1
depthwise convolution, that BatchNorm is left; so it is where t alone is still added behind anything but a
linear layer, whose bias it would be. What is folded is found nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

Vector = NDArray[np.float64]
Fingerprints = Mapping[str, tuple[Vector, Vector]]

_TOLERANCE = 1e-5
"""s and t pass through a few float32 roundings (1e-7 each); two random layers agree in one channel with a
chance of about this, in all of them never."""


@dataclasses.dataclass
class Trace:
    """The vectors that a graph works with, channel by channel: `scales` holds s of each batch norm op and of
    each product with a constant, `perhaps` what may be such a product (a 1×1 depthwise weight, a gate),
    `shifts` what is added behind no linear layer.
    """

    scales: list[Vector] = dataclasses.field(default_factory=list)
    perhaps: list[Vector] = dataclasses.field(default_factory=list)
    shifts: list[Vector] = dataclasses.field(default_factory=list)

    def left(self, batch_norms: Fingerprints) -> list[str]:
        """The names of the BatchNorms that are still computed."""
        return [
            name
            for name, (scale, shift) in batch_norms.items()
            if _among(scale, (*self.scales, *self.perhaps)) or _among(shift, self.shifts)
        ]

    def unnamed(self, batch_norms: Fingerprints, own: Trace) -> int:
        """How many batch norms and per-channel products are nobody's: two layers composed, for instance.

        `own` is the trace of the original, whose other constants (a layer scale) are the model's own.
        """
        scales = [scale for scale, _ in batch_norms.values()]
        lengths = {len(scale) for scale in scales}
        known = (*scales, *own.scales)
        found = [v for v in self.scales if len(v) in lengths and len(v) > 1]
        return sum(not _among(vector, known) for vector in found)


def fingerprints(graph: Any) -> dict[str, tuple[Vector, Vector]]:
    """The s and t of every BatchNorm that ran, by qualified name, from the observed original."""
    from bntool.folding.norms import find_norms

    found = {}
    for norm in find_norms(graph):
        if not norm.ops or "running_mean" not in norm.ops[0].inputs:
            continue
        op = norm.ops[0]
        mean, variance, weight, bias = (
            graph.constant(graph.input(op, role)).detach() if role in op.inputs else None
            for role in ("running_mean", "running_var", "weight", "bias")
        )
        scale = _scale(weight, variance, op.attrs["eps"])
        shift = (0 if bias is None else _vector(bias)) - scale * _vector(mean)
        found[norm.name] = (scale, shift)
    return found


def trace_torch(run: Callable[[], Any]) -> Trace:
    """What a torch model, scripted ones too, computes while `run` runs it."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), _Watch() as watch:
        run()
    return watch.trace


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.linear: set[int] = set()
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive.append(out)  # so that no id is given twice
        name = func._schema.name.split("::")[-1].removesuffix("_")
        bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if "batch_norm" in name and bound.get("running_var") is not None:
            self.trace.scales.append(_scale(bound.get("weight"), bound["running_var"], bound["eps"]))
        elif name.startswith(("convolution", "conv", "linear", "addmm", "mm", "matmul")):
            self.linear.add(id(out))
        elif name in ("mul", "div", "add", "sub"):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                if not (isinstance(one, torch.Tensor) and _is_vector(one.shape)):
                    continue
                vector = _vector(one)
                if name in ("mul", "div"):
                    self.trace.perhaps.append(vector if name == "mul" else 1 / vector)
                elif id(other) not in self.linear:
                    self.trace.shifts.append(-vector if name == "sub" else vector)
        return out


def trace_onnx(path: Path) -> Trace:
    """What the main graph of an ONNX file computes."""
    import onnx

    graph = onnx.load(path).graph
    constants = _Constants(graph)
    linear = {
        output
        for node in graph.node
        if node.op_type.endswith(("Conv", "ConvTranspose", "MatMul", "Gemm"))
        for output in node.output
    }
    trace = Trace()
    for node in graph.node:
        values = [constants.get(name) for name in node.input]
        if node.op_type == "BatchNormalization":
            eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            weight, _, _, variance = values[1:5]
            trace.scales.append(_scale(weight, variance, eps))
        elif node.op_type.endswith("Conv") and values[1] is not None and _is_vector(values[1].shape):
            trace.perhaps.append(_vector(values[1]))
        elif node.op_type in ("Mul", "Div", "Add", "Sub") and sum(v is not None for v in values) == 1:
            at = 0 if values[0] is not None else 1
            value = values[at]
            assert value is not None
            if not _is_vector(value.shape):
                continue
            vector = _vector(value)
            if node.op_type in ("Mul", "Div"):
                trace.scales.append(vector if node.op_type == "Mul" else 1 / vector)
            elif node.input[1 - at] not in linear:
                trace.shifts.append(-vector if node.op_type == "Sub" else vector)
    return trace


class _Constants:
    """The numbers behind the names of a graph that do not depend on its inputs."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self._known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._producers = {output: node for node in graph.node for output in node.output}

    def get(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]
        node = self._producers.get(name)
        found = None
        if node is not None and len(node.output) == 1:
            inputs = [self.get(n) for n in node.input if n]
            if all(value is not None for value in inputs) and (inputs or node.op_type == "Constant"):
                found = self._evaluated(node, inputs)
        self._known[name] = found
        return found

    def _evaluated(self, node: Any, inputs: list[Any]) -> Any:
        from onnx.reference import ReferenceEvaluator

        if node.op_type.startswith("Random"):
            return None
        fed = dict(zip((n for n in node.input if n), inputs, strict=True))
        return ReferenceEvaluator(node).run(None, fed)[0]


def trace_openvino(model: Any) -> Trace:
    """What a converted OpenVINO model computes."""
    trace = Trace()
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        sources = [op.input_value(i).get_node() for i in range(op.get_input_size())]
        if kind == "BatchNormInference":
            gamma, _, _, _, variance = sources
            trace.scales.append(_scale(_constant(gamma), _constant(variance), op.get_attributes()["epsilon"]))
        elif kind in ("Multiply", "Divide", "Add", "Subtract", "GroupConvolution"):
            values = [_constant(source) for source in sources]
            if sum(value is not None for value in values) != 1:
                continue
            at = 0 if values[0] is not None else 1
            if not _is_vector(values[at].shape):
                continue
            vector = _vector(values[at])
            if kind == "GroupConvolution":
                trace.perhaps.append(vector)
            elif kind in ("Multiply", "Divide"):
                trace.scales.append(1 / vector if kind == "Divide" else vector)
            elif not sources[1 - at].get_type_name().endswith(("Convolution", "BackpropData", "MatMul")):
                trace.shifts.append(-vector if kind == "Subtract" else vector)
    return trace


def _constant(node: Any) -> Any:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def _scale(weight: Any, variance: Any, eps: float) -> Vector:
    scale: Vector = 1 / np.sqrt(_vector(variance) + eps)
    return scale if weight is None else scale * _vector(weight)


def _vector(value: Any) -> Vector:
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    return np.asarray(array, dtype=np.float64).reshape(-1)


def _is_vector(shape: Any) -> bool:
    """One number a channel: at most one axis is longer than 1."""
    return sum(n > 1 for n in shape) <= 1 and len(shape) > 0


def _among(vector: Vector, candidates: Any) -> bool:
    return any(
        len(other) == len(vector) and np.allclose(other, vector, rtol=_TOLERANCE, atol=_TOLERANCE)
        for other in candidates
    )
