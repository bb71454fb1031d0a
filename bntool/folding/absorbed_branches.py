"""Branches that leave a module tree: layers that give zeros from then on, for the forward still adds them.

A user's forward adds what its layers give. So one convolution of a sum becomes the whole sum, and every other
layer of it gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from bntool.core.reasons import Reason
from bntool.folding.norms import Norm
from bntool.graph.affine import Affine, identity, is_finite
from bntool.graph.dataflow import Graph, Op
from bntool.laws import Context, Refused
from bntool.laws.base import constant_operand

_ZERO, _BESIDE, _HEIR = range(3)
"""What a value of the sum will be: zeros; what is added beside them; something with the heir in it."""


def can_be_heir(graph: Graph, conv: Op) -> None:
    """Refuse a convolution whose layer cannot be given another window and a bias."""
    module = graph.modules[_layer_of(graph, conv)]
    if module.role != "conv" or not module.plain_bias:
        _refuse(Reason.CUSTOM_FORWARD, f"{module.name} cannot become another convolution")


def layers_that_go(
    graph: Graph, gone: set[int], kept: Mapping[int, Norm], root: Op, members: frozenset[int], heir: Op
) -> tuple[tuple[str, ...], tuple[Op, ...]]:
    """The layers that must give a zero for the sum to be what `heir` gives, in the order they ran, and the
    products by which the forward scales what it gives.

    Args:
        graph: of a module tree.
        gone: ops that hand their input on, for their BatchNorm is folded.
        kept: the BatchNorms that the sum takes with it, by op.
        root: the op whose output is the sum.
        members: the ops that do nothing else.
        heir: the convolution that becomes the whole sum.

    Raises `Refused` where the forward does more with a branch than to add it.
    """
    becomes: dict[int, int] = {}
    layers: list[str] = []
    factors: list[Op] = []
    for op in (graph.ops[i] for i in sorted(members)):
        reads = [becomes.get(op.inputs[r], _BESIDE) for r in op.reads if not graph.input(op, r).constant]
        if op is heir:
            result = _HEIR
        elif op.kind == "conv":
            layers.append(_layer_of(graph, op))
            result = _ZERO
        elif op.id in gone or op.kind == "identity":
            (result,) = reads
        elif op.id in kept:
            result = _HEIR if _HEIR in reads else _ZERO
            if result is _ZERO:
                layers.append(_layer_of(graph, op))
        elif reads == [_HEIR] and op.kind in ("mul", "div"):
            factors.append(op)
            result = _HEIR
        else:
            result = _after_arithmetic(op, reads)
        becomes[op.outputs[0]] = result
    if becomes[root.outputs[0]] is not _HEIR:
        _refuse(Reason.MIXED_BRANCHES, f"{heir.label} is no part of the sum")
    return tuple(layers), tuple(factors)


def undone(context: Context, factors: Sequence[Op], rank: int) -> Affine:
    """What undoes the products that the forward makes of the sum; refused where one is by zero."""
    found = identity(rank)
    for op in factors:
        role = next(role for role in op.reads if not context.graph.input(op, role).constant)
        factor = constant_operand(context, op, role)
        found = found.then_constant("times", factor, -1 if op.kind == "mul" else 1)
    if not is_finite((found.scale, found.shift)) or not bool(found.scale.all()):
        _refuse(Reason.ZERO_SCALE, "the forward multiplies the sum by zero")
    return found


def _after_arithmetic(op: Op, reads: list[int]) -> int:
    """What an op of the forward's own makes of what it will be given: the parts that depend on the data."""
    if op.inplace and reads[0] is not _HEIR:
        _refuse(Reason.MIXED_BRANCHES, f"{op.label} writes to a branch in place")
    if reads.count(_HEIR) > 1:
        _refuse(Reason.MIXED_BRANCHES, f"{op.label} adds one branch twice")
    if reads == [_ZERO] and op.kind in ("mul", "div"):
        return _ZERO
    if len(reads) == 1 and adds_a_constant(op):
        return max(*reads, _BESIDE)
    plain = op.kind == "add" and op.attrs["alpha"] == 1.0
    if len(reads) != 2 or not (plain or (reads[1] is _ZERO and op.kind in ("add", "sub"))):
        _refuse(Reason.MIXED_BRANCHES, f"{op.label} does more with a branch than to add it")
    return max(reads)


def adds_a_constant(op: Op) -> bool:
    """Whether an op with one operand that depends on the data leaves that as it is, and adds to it."""
    return op.kind == "add" and op.attrs["alpha"] == 1.0


def _layer_of(graph: Graph, op: Op) -> str:
    """The layer that does nothing but this op; refused where there is none."""
    module = graph.modules.get(op.scope)
    if (
        module is None
        or module.calls != 1
        or module.hooked
        or module.role == "scripted"
        or module.whole != [[op.id]]
        or module.inputs != [op.inputs["input"]]
        or module.outputs != [op.outputs[0]]
    ):
        _refuse(Reason.CUSTOM_FORWARD, f"{op.label} is not a layer of its own")
    return op.scope


def _refuse(reason: Reason, detail: str) -> NoReturn:
    raise Refused(reason, detail)
