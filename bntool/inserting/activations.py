"""The activation behind a layer: one op, or several that compute one function of a single value."""

from __future__ import annotations

import dataclasses

from bntool.core.activations import ACTIVATIONS
from bntool.graph.dataflow import Graph, Op, Value

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "pow", "identity"})
_WRITTEN_OUT = {
    ("sigmoid",): "silu",
    ("hardsigmoid",): "hardswish",
    ("relu6",): "hardswish",
    ("clamp",): "hardswish",
    ("clamp", "relu"): "hardswish",  # clamped below, then above, as a decomposed program does it
    ("hardtanh",): "hardswish",
    ("softplus", "tanh"): "mish",
    ("erf",): "gelu",
    ("tanh",): "gelu",
}
"""What x·f(x) is called, by the ops in f that are not arithmetic: x·sigmoid(x), x·relu6(x + 3)/6, …"""
_MOST_OPS = 12
"""GELU by tanh, the longest of them, has nine."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """Its kind (`relu`, `silu`, …) and its ops in the order they ran."""

    kind: str
    ops: tuple[Op, ...]

    @property
    def last(self) -> Op:
        return self.ops[-1]


def activation_of(graph: Graph, value: Value) -> Activation | None:
    """The activation that everyone who reads `value` is part of; None where there is another reader."""
    readers = [graph.ops[reader] for reader, _ in value.readers]
    if len(readers) == 1:
        return Activation(readers[0].kind, (readers[0],)) if readers[0].kind in ACTIVATIONS else None
    return _written_out(graph, value)


def ends_one(op: Op, kind: str) -> bool:
    """Whether an activation of this kind may end in `op`."""
    return op.kind == kind or (op.kind in ("mul", "div") and kind in _WRITTEN_OUT.values())


def _written_out(graph: Graph, value: Value) -> Activation | None:
    """Ops that read nothing but `value`, constants and each other, and meet in x times a function of x."""
    own, ops = {value.id}, list[Op]()
    waiting = {reader for reader, _ in value.readers}
    while waiting and len(ops) < _MOST_OPS:
        op = graph.ops[min(waiting)]
        waiting.remove(op.id)
        if op.kind not in _ARITHMETIC and not any(op.kind in kinds for kinds in _WRITTEN_OUT):
            return None
        if any(v not in own and not graph.values[v].constant for v in op.inputs.values()):
            return None
        ops.append(op)
        if not waiting:
            break
        made = graph.output(op)
        if _is_seen(made) or not made.readers:
            return None
        own.add(made.id)
        waiting |= {reader for reader, _ in made.readers}
    functions = tuple(sorted({op.kind for op in ops} - _ARITHMETIC))
    if waiting or functions not in _WRITTEN_OUT or not _is_product(graph, ops[-1], value):
        return None
    return Activation(_WRITTEN_OUT[functions], (*ops, *_scaled(graph, ops[-1])))


def _is_seen(made: Value) -> bool:
    return bool(made.is_output or made.escapes or made.watched)


def _is_product(graph: Graph, op: Op, value: Value) -> bool:
    """Whether `op` multiplies `value` itself, or a multiple of it, by something."""
    if op.kind != "mul" or len(op.inputs) != 2:
        return False
    return any(_root(graph, factor) == value.id for factor in op.inputs.values())


def _root(graph: Graph, factor: int) -> int:
    """The value that `factor` is a multiple of by constants; itself where it is none."""
    while (made := graph.producer(graph.values[factor])) is not None and made.kind in (
        "mul",
        "div",
        "identity",
    ):
        varying = [v for v in made.inputs.values() if not graph.values[v].constant]
        if len(varying) != 1:
            break
        (factor,) = varying
    return factor


def _scaled(graph: Graph, op: Op) -> list[Op]:
    """The constant factors right behind, as in x·relu6(x + 3)/6."""
    found: list[Op] = []
    while True:
        made = graph.output(op)
        readers = [graph.ops[reader] for reader, _ in made.readers]
        if _is_seen(made) or len(readers) != 1 or readers[0].kind not in ("mul", "div"):
            return found
        (op,) = readers
        others = [v for v in op.inputs.values() if v != made.id]
        if op.inputs.get("input") != made.id or not all(graph.values[v].constant for v in others):
            return found
        found.append(op)
