"""The activation behind a layer: one op, or several that compute one function of a single value."""

from __future__ import annotations

import dataclasses

from bntool.graph import Graph, Op, Value
from bntool.observe.aten import ACTIVATIONS

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "pow"})
_WRITTEN_OUT = {
    ("sigmoid",): "silu",
    ("hardsigmoid",): "hardswish",
    ("relu6",): "hardswish",
    ("clamp",): "hardswish",
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


def _written_out(graph: Graph, value: Value) -> Activation | None:
    """Ops that read nothing but `value`, constants and each other, and meet in one product."""
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
        if made.is_output or made.escapes or made.watched:
            return None
        own.add(made.id)
        waiting |= {reader for reader, _ in made.readers}
    functions = tuple(sorted({op.kind for op in ops} - _ARITHMETIC))
    if waiting or functions not in _WRITTEN_OUT or not ops or ops[-1].kind != "mul":
        return None
    return Activation(_WRITTEN_OUT[functions], tuple(ops))
