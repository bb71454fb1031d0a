"""What a BatchNorm that goes leaves behind: its output is then the very memory of its input."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.dataflow import Graph, Op, Value
from bntool.laws import Refused

_VIEWS = frozenset(
    """identity reshape flatten squeeze unsqueeze permute slice select split expand unbind unfold
    overwritten_view""".split()
)
"""Kinds of op whose output may be the memory of their input for other sizes, if not for these."""


class Overwritten(Refused):
    """All else is found; a write in place alone keeps the BatchNorm."""


def require_no_overwriting(norm: Op, graph: Graph, gone: set[int]) -> None:
    """Without the BatchNorm its output *is* its input: a later write to it must concern nobody else."""
    family, private = _seen_from(graph.input(norm), graph, gone)
    if private:
        return
    waiting = list(family)
    while waiting:
        for reader, role in graph.values[waiting.pop()].readers:
            op = graph.ops[reader]
            if op.inplace and role in op.writes and op.id > norm.id:
                what = f"{op.label} would write in place what others read"
                raise Overwritten(Reason.OUTPUT_USED_ELSEWHERE, what)
            if op.id == norm.id or role in _roles_seen(op, gone):
                new = [value for value in op.outputs if value not in family]
                family.update(new)
                waiting += new


def _seen_from(value: Value, graph: Graph, gone: set[int]) -> tuple[set[int], bool]:
    """Whatever may be the memory of a value, back to where it was made; and whether nobody else reads any."""
    family: set[int] = set()
    private, waiting = True, [value]
    while waiting:
        seen = waiting.pop()
        if seen.id in family:
            continue
        family.add(seen.id)
        maker = graph.producer(seen)
        private &= maker is not None and len(seen.readers) == 1 and not seen.is_output and not seen.escapes
        if maker is not None:
            waiting += (graph.input(maker, role) for role in _roles_seen(maker, gone) & maker.inputs.keys())
    return family, private


def _roles_seen(op: Op, gone: set[int]) -> set[str]:
    """The inputs whose memory the outputs of an op may be."""
    return {*op.views, "input"} if op.id in gone or op.kind in _VIEWS else set(op.views)
