"""Layers with a forward of their own and no bias: whether it would use one, found out by giving them one."""

from __future__ import annotations

from torch import nn

from bntool.errors import ObserveError
from bntool.graph import Graph, Op
from bntool.observe.copying import structural_copy
from bntool.observe.eager import Observation, observe


def would_use_a_bias(model: nn.Module, observation: Observation) -> set[str]:
    """The layers that hand `self.bias` to their operator, although their class is not known to.

    They are run once more, on a copy in which each has a bias of zeros. Only where the model has such layers.
    """
    unsure = dict.fromkeys(op.scope for op in observation.graph.ops if _is_unsure(observation.graph, op))
    if not unsure:
        return set()
    copied = structural_copy(model)
    for name in unsure:
        layer = copied.get_submodule(name)
        count = getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels")
        layer.register_parameter("bias", nn.Parameter(layer.weight.new_zeros(count)))  # type: ignore[operator]
    try:
        graph = observe(copied, observation.inputs).graph
    except ObserveError:
        return set()
    calls: dict[str, list[bool]] = {name: [] for name in unsure}
    for op in graph.ops:
        if op.scope in calls and op.kind in ("conv", "linear"):
            own = "bias" in op.inputs and graph.input(op, "bias").handle == f"{op.scope}.bias"
            calls[op.scope].append(own)
    return {name for name, reads in calls.items() if reads and all(reads)}


def _is_unsure(graph: Graph, op: Op) -> bool:
    module = graph.modules.get(op.scope)
    if module is None or module.role not in ("conv", "linear") or module.plain_bias:
        return False
    return op.kind in ("conv", "linear") and "bias" not in op.inputs
