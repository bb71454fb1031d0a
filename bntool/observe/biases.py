"""Layers with a forward of their own and no bias: whether it would use one, found out by giving them one."""

from __future__ import annotations

from typing import Any

from torch import nn

from bntool.core.errors import ObserveError
from bntool.graph.dataflow import Graph
from bntool.observe.copying import structural_copy
from bntool.observe.eager import Observation, observe


def would_use_a_bias(model: nn.Module, observation: Observation) -> set[str]:
    """The layers that hand `self.bias` to their operator and do nothing else with it, where their class alone
    does not tell.

    They are run once more, on a copy in which each has a bias of zeros. Only where the model has such layers.
    """
    graph = observation.graph
    unsure = _unsure(graph)
    if not unsure:
        return set()
    copied = structural_copy(model)
    counts = _channels(graph, unsure)
    given = {name for name in unsure if _give_bias(copied.get_submodule(name), counts[name])}
    if not given:
        return set()
    try:
        again = observe(copied, observation.inputs).graph
    except ObserveError:
        return set()
    before, after = _steps(graph, given), _steps(again, given)
    if before[""] != after[""]:
        return set()  # code outside of the layers looks at their biases
    return {name for name in given if before[name] == after[name] and _read_biases(again, name)}


def _unsure(graph: Graph) -> set[str]:
    """The layers without a bias whose class is not known to use one."""
    found = set()
    for op in graph.ops:
        module = graph.modules.get(op.scope)
        if module is None or module.plain_bias or op.kind not in ("conv", "linear") or "bias" in op.inputs:
            continue
        if module.role in ("conv", "linear") or graph.input(op, "weight").handle == _own(op.scope, "weight"):
            found.add(op.scope)
    return found


def _channels(graph: Graph, layers: set[str]) -> dict[str, int]:
    """How many channels the output of each layer has."""
    counts = {}
    for op in graph.of_kind("conv", "linear"):
        if op.scope in layers:
            shape = graph.output(op).shape
            counts[op.scope] = shape[-1 - int(op.attrs["dims"]) if op.kind == "conv" else -1]
    return counts


def _own(layer: str, slot: str) -> str:
    """The handle of a layer's own tensor."""
    return f"{layer}.{slot}".lstrip(".")


def _give_bias(layer: nn.Module, count: int) -> bool:
    """Give a layer a bias of `count` zeros; not one that keeps its tensors in a way of its own."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or "bias" not in layer._parameters:
        return False
    layer.register_parameter("bias", nn.Parameter(weight.new_zeros(count)))
    return True


def _steps(graph: Graph, layers: set[str]) -> dict[str, list[Any]]:
    """What ran inside each layer, and, under the empty name, outside of all of them."""
    steps: dict[str, list[Any]] = {name: [] for name in (*layers, "")}
    for op in graph.ops:
        where = op.scope if op.scope in layers else ""
        steps[where].append((op.kind, op.attrs, "" if where else op.scope))
    return steps


def _read_biases(graph: Graph, name: str) -> bool:
    """Whether every call of the layer hands its bias to the operator."""
    return all(
        "bias" in op.inputs and graph.input(op, "bias").handle == _own(name, "bias")
        for op in graph.ops
        if op.scope == name and op.kind in ("conv", "linear")
    )
