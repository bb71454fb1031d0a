"""What a BatchNorm that goes leaves behind: its output is then the very memory of its input."""

from __future__ import annotations

from bntool.graph import Graph, Op
from bntool.laws import Refused
from bntool.reasons import Reason

_VIEWS = frozenset(
    """identity reshape permute slice select split expand expand_as unbind movedim moveaxis swapdims mT
    numpy_T adjoint diagonal unfold as_strided overwritten_view""".split()
)
"""Kinds of op whose output may be the memory of their input."""


def require_no_overwriting(norm: Op, graph: Graph, gone: set[int]) -> None:
    """Without the BatchNorm its output *is* its input: a later write to it must concern nobody else."""
    value = root = graph.input(norm)
    private = True
    while True:
        private &= len(value.readers) == 1 and not value.is_output and not value.escapes
        root, maker = value, graph.producer(value)
        if maker is None or not (maker.kind in _VIEWS or maker.id in gone):
            break
        value = graph.input(maker)
    if private and root.producer is not None:
        return
    waiting = [root.id]
    while waiting:
        for reader, role in graph.values[waiting.pop()].readers:
            op = graph.ops[reader]
            if op.inplace and role in ("input", "out") and op.id > norm.id:
                what = f"{op.label} would write in place what others read"
                raise Refused(Reason.OUTPUT_USED_ELSEWHERE, what)
            if op.id == norm.id or op.kind in _VIEWS or op.id in gone:
                waiting += op.outputs
