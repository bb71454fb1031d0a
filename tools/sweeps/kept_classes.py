"""What stands around the BatchNorms that a fold keeps: the classes of which `docs/elsewhere-kept.md` tells.

A class is a reason and the kinds of op before the BatchNorm, behind it, and beside it: those that read its
input too. Ops that only move numbers about, and those that have gone, are looked through.
"""

from __future__ import annotations

import collections
from typing import Any

_THROUGH = frozenset(
    """identity reshape flatten squeeze unsqueeze permute slice split chunk unbind select index_select pad
    expand repeat stack""".split()
)
_WORDS = {
    **dict.fromkeys("relu leaky_relu prelu".split(), "ReLU"),
    **dict.fromkeys(
        "gelu silu elu celu selu sigmoid tanh hardswish hardsigmoid relu6 hardtanh mish softplus".split(),
        "curve",
    ),
    **dict.fromkeys("add sub rsub".split(), "sum"),
    **dict.fromkeys("conv linear matmul".split(), "layer"),
    **dict.fromkeys("mul div".split(), "product"),
    **dict.fromkeys("max_pool adaptive_max_pool amax".split(), "maximum"),
    **dict.fromkeys("avg_pool adaptive_avg_pool mean upsample sum".split(), "mean"),
    "concat": "concat",
    "batch_norm": "BatchNorm",
}


def classes(graph: Any, plan: Any) -> dict[str, list[Any]]:
    """By class: how many BatchNorms, and the name of the first."""
    gone = {site.bn for site in plan.sites}
    calls = collections.defaultdict(list)
    for op in graph.of_kind("batch_norm"):
        calls[op.scope].append(op)
    found: dict[str, list[Any]] = {}
    for skip in plan.skips:
        op = calls[skip.name][0] if calls[skip.name] else None
        around = "" if op is None else _around(graph, op, gone)
        reason = skip.reason.value + ", written over" * ("write in place" in skip.detail)
        found.setdefault(f"{reason}: {around}".rstrip(": "), [0, skip.name])[0] += 1
    return found


def _around(graph: Any, op: Any, gone: set[str]) -> str:
    beside = _readers(graph, graph.input(op), gone, {op.id})
    behind = _readers(graph, graph.output(op), gone, set())
    return f"{_before(graph, op, gone)} → BN → {behind or 'output'}" + (
        f"; beside: {beside}" if beside else ""
    )


def _word(op: Any) -> str:
    return _WORDS.get(op.kind, op.kind)


def _looked_through(op: Any, gone: set[str]) -> bool:
    return op.kind in _THROUGH or (op.kind == "batch_norm" and op.scope in gone)


def _before(graph: Any, op: Any, gone: set[str]) -> str:
    while (made := graph.producer(graph.input(op))) is not None:
        if not _looked_through(made, gone):
            return _word(made)
        op = made
        if "input" not in op.inputs:
            return _word(op)
    return "input"


def _readers(graph: Any, value: Any, gone: set[str], seen: set[int]) -> str:
    """The kinds of what reads a value, each once."""
    words: set[str] = set()
    values = [value]
    while values:
        for number, _ in values.pop().readers:
            if number in seen:
                continue
            seen.add(number)
            op = graph.ops[number]
            if _looked_through(op, gone):
                values += [graph.values[v] for v in op.outputs]
            else:
                words.add(_word(op))
    return ", ".join(sorted(words))
