"""What stands between a layer and its activation, and a site before its name is settled."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bntool.graph.dataflow import Graph, Op, Value
from bntool.inserting.activations import activation_of

Form = Literal["identity", "sequential", "wrap", "subclass", "pair", "node"]

_THROUGH = frozenset({"identity", "dropout"})
"""Ops that keep every number, in eval mode at least."""
_POOLING = frozenset({"max_pool", "avg_pool", "adaptive_avg_pool"})
"""Ops that keep the channels."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A site before the names are settled: `slot` gets a new child behind `after_child` (`sequential`).

    `direct` says that the newcomer reads exactly what the layer put out, in train mode too; `lone`, that it
    sees one value per channel of each sample.
    """

    conv: str
    activation: str
    kind: str
    channels: int
    dims: int
    form: Form
    slot: str
    after_child: str = ""
    calls: int = 1
    direct: bool = True
    lone: bool = False


def passes(op: Op, *, pooling: bool) -> bool:
    """Whether an op may stand between a layer and its activation."""
    return op.kind in _THROUGH or (pooling and op.kind in _POOLING)


def passes_node(graph: Graph, op: Op) -> bool:
    """What may stand there besides where the newcomer goes right behind the layer, whatever the axes then.

    That is another order of the axes, and a bias that is added in that order.
    """
    others = [v for v in op.inputs.values() if not graph.values[v].constant]
    return op.kind == "permute" or (op.kind == "add" and len(others) == 1)


def activation_behind(graph: Graph, value: Value, *, pooling: bool = False) -> str:
    """The kind of the one activation that reads a value, through ops that keep channels; else empty."""
    while True:
        if found := activation_of(graph, value):
            return found.kind
        readers = [graph.ops[reader] for reader, _ in value.readers]
        if len(readers) != 1 or not passes(readers[0], pooling=pooling):
            return ""
        value = graph.output(readers[0])


def layer_before(graph: Graph, value: Value, *, pooling: bool = False) -> Op | None:
    """The op that made a value, behind ops that keep channels and hand it to nobody else."""
    while True:
        producer = graph.producer(value)
        if producer is None or len(value.readers) != 1:
            return None
        if not passes(producer, pooling=pooling):
            return producer
        value = graph.input(producer)
