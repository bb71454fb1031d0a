"""BatchNorms that are written out as arithmetic, in any graph: found, and put together as one op again.

A run of sums and products with constants counts as a BatchNorm where it computes s·x + t with a factor and a
summand for each channel: (x − μ)/√(σ²+ε)·γ + β as exporters and frozen layers write it, in any order and
partly multiplied out. A factor alone (a layer scale), a summand alone (a bias) and scalars are none, and
neither is the affine part of a normalisation by statistics of the data itself (LayerNorm, GroupNorm).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bntool.graph.dataflow import WRITTEN_OUT, Graph, Module, Op, Value

_ARITHMETIC = frozenset("add sub mul div".split())
_BEGINNINGS = _ARITHMETIC | {"addcmul"}
_SLOTS = ("weight", "bias", "running_mean", "running_var")
_MOVES = frozenset("reshape flatten squeeze unsqueeze permute identity expand".split())
_ROOTS = frozenset("Sqrt sqrt rsqrt Reciprocal reciprocal Pow pow ReduceL2 linalg_vector_norm std".split())
"""Kinds of op behind a divisor or a factor that is a spread of the data."""
_NORMALISERS = frozenset(
    """InstanceNormalization LayerNormalization GroupNormalization RMSNormalization MeanVarianceNormalization
    LpNormalization native_layer_norm layer_norm native_group_norm group_norm instance_norm rms_norm
    _fused_rms_norm native_batch_norm _native_batch_norm_legit""".split()
)


@dataclasses.dataclass(frozen=True)
class TakenApart:
    """Elementwise ops in a row, and the map that they compute together: vectors along `axis`, in float64.

    `role` is the role that the data play in the first op.
    """

    ops: tuple[Op, ...]
    role: str
    axis: int
    scale: Tensor
    shift: Tensor


def norms_taken_apart(
    graph: Graph, may: Callable[[Op], bool], among: Iterable[Op] | None = None
) -> list[TakenApart]:
    """Every BatchNorm of the graph that is written out as ops; `may` tells which ops can be taken out.

    With `among`, only those that begin with one of these ops.
    """
    found: list[TakenApart] = []
    seen: set[int] = set()
    for op in graph.ops if among is None else among:
        if op.kind not in _BEGINNINGS or op.id in seen:
            continue
        run = _run_from(graph, op, may)
        seen.update(member.id for member in run.ops)
        if run.has_factor and run.has_summand and not _normalised(graph, run.source):
            axis = next(iter(run.axes))
            scale, shift = (part.expand(run.channels) for part in (run.scale, run.shift))
            found.append(TakenApart(tuple(run.ops), run.role, axis, scale, shift))
    return found


def put_together(graph: Graph, norm: TakenApart, name: str, stem: str) -> None:
    """Let one BatchNorm called `name`, with a mean of 0 and a variance of 1, stand for the ops.

    It stands in place of the last one; the others read and make nothing any more. Its tensors are called
    `stem` and their own name.
    """
    source = norm.ops[0].inputs[norm.role]
    for op in norm.ops:
        for role, value in op.inputs.items():
            graph.values[value].readers.remove((op.id, role))
        op.inputs = {}
    *before, last = norm.ops
    for op in before:
        graph.values[op.outputs[0]].producer = None
        op.kind, op.outputs = "absorbed", ()
    last.kind, last.scope, last.inputs = "batch_norm", name, {"input": source}
    last.attrs = {"eps": 0.0, "training": False, "axis": norm.axis}
    zero, one = torch.zeros_like(norm.scale), torch.ones_like(norm.scale)
    for slot, tensor in zip(_SLOTS, (norm.scale, norm.shift, zero, one), strict=True):
        stored = graph.add_value(
            tuple(tensor.shape), handle=f"{stem}{slot}", constant=True, dtype=str(tensor.dtype)
        )
        graph.tensors[stored.handle] = tensor
        last.inputs[slot] = stored.id
    for role, value in last.inputs.items():
        graph.values[value].readers.append((last.id, role))
    graph.modules[name] = Module(name, WRITTEN_OUT, role="norm", calls=1)


class _Run:
    """The longest run of arithmetic with constants so far, as one affine map."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.role = ""
        self.source: Value | None = None
        self.axes: set[int] = set()
        self.channels = 1
        self.scale = torch.ones(1, dtype=torch.float64)
        self.shift = torch.zeros(1, dtype=torch.float64)
        self.has_factor = self.has_summand = False

    def extend(self, graph: Graph, op: Op) -> bool:
        """Take one op more in; False where it is no arithmetic with a constant per channel of this run."""
        roles = [role for role, value in op.inputs.items() if not graph.values[value].constant]
        if op.kind == "addcmul" and roles in (["tensor1"], ["tensor2"]):
            return self._extend_by_both(graph, op, roles[0])
        if op.kind not in _ARITHMETIC or op.inplace or len(roles) != 1 or len(op.outputs) != 1:
            return False
        role = roles[0]
        data, result = graph.input(op, role), graph.output(op)
        if data.shape != result.shape or data.dtype != result.dtype or not _floating(data.dtype):
            return False
        if op.attrs["alpha"] is None:
            return False  # it may have been read from the data
        alpha = float(op.attrs["alpha"])
        if role != "input" and (op.kind == "div" or alpha != 1.0):
            return False
        operand = _operand(graph, op, role)
        axes = set() if operand is None else {i for i, size in enumerate(operand.shape) if size != 1}
        if operand is None or len(self.axes | axes) > 1 or any(not _is_channel(data, a) for a in axes):
            return False
        vector = operand.reshape(-1)
        if op.kind in ("mul", "div"):
            factor = vector if op.kind == "mul" else 1 / vector
            self.scale, self.shift = self.scale * factor, self.shift * factor
            self.has_factor |= bool(axes)
        else:
            self.has_summand |= bool(axes)
            if op.kind == "add":
                self.shift = self.shift + alpha * vector
            elif role == "input":
                self.shift = self.shift - alpha * vector
            else:
                self.scale, self.shift = -self.scale, vector - self.shift
        if not self.ops:
            self.role, self.source = role, data
        self.axes |= axes
        self.channels = max(self.channels, vector.numel())
        self.ops.append(op)
        return True

    def _extend_by_both(self, graph: Graph, op: Op, role: str) -> bool:
        """`addcmul`: a factor and a summand at once."""
        data, result = graph.input(op, role), graph.output(op)
        factor, summand = (
            _constant(graph, graph.input(op, other), len(data.shape))
            for other in ({"tensor1": "tensor2", "tensor2": "tensor1"}[role], "input")
        )
        if self.ops or factor is None or summand is None or data.dtype != result.dtype or op.inplace:
            return False
        axes = {i for part in (factor, summand) for i, size in enumerate(part.shape) if size != 1}
        if data.shape != result.shape or len(axes) != 1 or not _is_channel(data, *axes):
            return False
        self.scale, self.shift = op.attrs["alpha"] * factor.reshape(-1), summand.reshape(-1)
        self.role, self.source, self.axes = role, data, axes
        self.channels = max(factor.numel(), summand.numel())
        self.has_factor, self.has_summand = factor.numel() > 1, summand.numel() > 1
        self.ops.append(op)
        return True


def _run_from(graph: Graph, op: Op, may: Callable[[Op], bool]) -> _Run:
    run = _Run()
    while may(op) and run.extend(graph, op):
        value = graph.output(op)
        if len(value.readers) != 1 or value.is_output or value.escapes:
            break
        op = graph.ops[value.readers[0][0]]
    return run


def _operand(graph: Graph, op: Op, role: str) -> Tensor | None:
    """The constant beside the data in float64, with as many axes as they have; None where it is not known."""
    if op.attrs["number"] is not None:
        return torch.tensor([float(op.attrs["number"])], dtype=torch.float64)
    others = [graph.values[value] for other, value in op.inputs.items() if other != role]
    return _constant(graph, others[0], len(graph.input(op, role).shape)) if len(others) == 1 else None


def _constant(graph: Graph, value: Value, rank: int) -> Tensor | None:
    """The numbers of a constant in float64, with `rank` axes; None where they are not known."""
    tensor = graph.constant(value)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() > rank:
        return None
    return tensor.detach().double().cpu().reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))


def _is_channel(data: Value, axis: int) -> bool:
    """Channels lie along axis 1, or the last one."""
    return axis > 0 and axis in (1, len(data.shape) - 1)


def _floating(dtype: str) -> bool:
    return dtype.removeprefix("torch.").startswith(("float", "bfloat"))


def _normalised(graph: Graph, value: Value | None) -> bool:
    """Whether the data were divided by a spread of their own just before: another normalisation's affine."""
    maker = next((op for op in _makers(graph, value) if op.kind not in _MOVES), None)
    if maker is None or maker.kind not in ("mul", "div"):
        return maker is not None and (maker.kind in _NORMALISERS or _of_the_batch(maker))
    operands = [graph.values[v] for v in maker.inputs.values() if not graph.values[v].constant]
    return len(operands) == 2 and any(_is_spread(graph, operand) for operand in operands)


def _of_the_batch(op: Op) -> bool:
    return op.kind == "batch_norm" and (op.attrs["training"] or "running_mean" not in op.inputs)


def _is_spread(graph: Graph, value: Value) -> bool:
    """A root of something, or what is left of one after a clamp or an epsilon."""
    passing = _MOVES | {"Max", "Clip", "clamp", "clamp_min", "add"}
    maker = next((op for op in _makers(graph, value) if op.kind not in passing), None)
    return maker is not None and maker.kind in _ROOTS


def _makers(graph: Graph, value: Value | None) -> Iterator[Op]:
    """The op that made a value, then the one that made its data, and so on back."""
    while value is not None:
        op = graph.producer(value)
        if op is None:
            return
        yield op
        value = next((graph.values[v] for v in op.inputs.values() if not graph.values[v].constant), None)
