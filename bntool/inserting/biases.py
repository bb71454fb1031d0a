"""Biases that a BatchNorm behind them makes redundant: they move into its running mean.

BatchNorm takes the mean of its input away: that of the batch in train mode, the running one in eval mode. A
bias b before it shifts both alike, so BN(W·x + b) is BN'(W·x) with μ' = μ − b, in both modes and exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

from bntool.core.sites import DroppedBias
from bntool.graph.dataflow import Graph, Op, Value


def redundant_biases(graph: Graph) -> Iterator[DroppedBias]:
    """The layers of a model whose output goes into a BatchNorm alone, and which have a bias of their own."""
    for op in graph.of_kind("conv", "linear"):
        value = graph.output(op)
        module = graph.modules.get(op.scope)
        if module is None or module.role not in ("conv", "linear") or module.calls != 1:
            continue
        readers = [graph.ops[reader] for reader, _ in value.readers]
        if len(readers) != 1 or readers[0].kind != "batch_norm" or not untouched(graph, value):
            continue
        norm = graph.modules.get(readers[0].scope)
        if readers[0].attrs.get("frozen"):
            continue  # in train mode too it takes stored means away, so the bias before it learns
        if norm is None or norm.role not in ("norm", "norm_act") or norm.calls != 1 or norm.hooked:
            continue
        if (
            readers[0].attrs["axis"] == 1
            and len(value.shape) == batched_rank(op)
            and (bias := own_bias(graph, [op]))
        ):
            yield DroppedBias(op.scope, bias, (norm.name,), value.shape[1])


def batched_rank(op: Op) -> int:
    """How many axes a layer puts out where the channels lie on axis 1, where BatchNorm looks for them."""
    return int(op.attrs.get("dims", 1)) + 2 if op.kind == "conv" else 2


def untouched(graph: Graph, value: Value) -> bool:
    """Whether nobody else sees a value, and nothing that acts in train mode stands behind it."""
    if value.is_output or value.escapes or value.watched:
        return False
    return all(graph.modules[name].role == "identity" for name in value.through)


def own_bias(graph: Graph, ops: list[Op]) -> str:
    """The bias that these calls of one layer read and nobody else; empty where there is none to give up."""
    layer = graph.modules[ops[0].scope]
    if not layer.plain_bias or any("bias" not in op.inputs for op in ops):
        return ""
    bias = graph.input(ops[0], "bias")
    calls = {op.id for op in ops}
    if bias.handle != f"{layer.name}.bias".lstrip(".") or {reader for reader, _ in bias.readers} != calls:
        return ""
    places = {f"{name}.bias" for name in (layer.name, *graph.aliases.get(layer.name, ()))}
    return bias.handle if set(graph.aliases.get(bias.handle, ())) <= places else ""
