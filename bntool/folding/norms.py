"""The BatchNorms of a graph, what each computes, and whether it may go at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.core.patterns import chosen
from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, batch_norm_affine, is_finite
from bntool.graph.dataflow import WRITTEN_OUT, Graph, Op
from bntool.laws import Refused

_ROLES = ("norm", "norm_act", "custom_norm", "scripted")
_STORED = ("running_mean", "running_var", "weight", "bias")


@dataclasses.dataclass
class Norm:
    """One BatchNorm layer: all its calls, and its affine map as it stands now, or why it stays untouched."""

    name: str
    ops: list[Op]
    affine: Affine | None = None
    unfit: Refused | None = None

    def placed(self, graph: Graph, op: Op) -> Affine:
        """The map over the channel axis of this call's data."""
        assert self.affine is not None
        return self.affine.then("place", len(graph.input(op).shape), op.attrs["axis"])


def find_norms(graph: Graph) -> list[Norm]:
    """Every BatchNorm in the order it first ran, then those that never ran."""
    norms: dict[str, Norm] = {}
    functional: dict[str, int] = {}
    for op in graph.of_kind("batch_norm"):
        if graph.input(op).constant:
            continue  # a weight being standardised, not data
        if owner := _owner(op, graph):
            norms.setdefault(owner, Norm(owner, [])).ops.append(op)
            continue
        index = functional[op.scope] = functional.get(op.scope, -1) + 1
        name = f"{op.scope}.batch_norm" if op.scope else "batch_norm"
        name = f"{name}_{index}" if index else name
        norms[name] = Norm(name, [op])
    for name, module in graph.modules.items():
        if module.role in ("norm", "norm_act", "custom_norm") and name not in norms:
            norms[name] = Norm(name, [])
    return list(norms.values())


def _owner(op: Op, graph: Graph) -> str:
    """The layer that runs here, or else whose statistics or parameters a function is called with."""
    handles = (graph.input(op, role).handle for role in _STORED if role in op.inputs)
    for name in (op.scope, *(handle.rpartition(".")[0] for handle in handles if handle)):
        if name in graph.modules and graph.modules[name].role in _ROLES:
            return name
    return ""


def why_unfit(
    norm: Norm, graph: Graph, norm_of: dict[int, Norm], include: Sequence[str], exclude: Sequence[str]
) -> Refused | None:
    """Why this BatchNorm cannot go, whatever stands around it; else reads its affine map."""
    module = graph.modules.get(norm.name)
    if not chosen(norm.name, include, exclude):
        return Refused(Reason.EXCLUDED, "left out by --include/--exclude")
    if module is not None and module.calls and _is_quantized(norm, graph):
        return Refused(Reason.QUANTIZED, "it is part of a quantized layer, which torch.ao converts")
    if module is not None and module.from_outside:
        what = "it is called through a lambda or an object that holds it, which would call it still"
        return Refused(Reason.CUSTOM_FORWARD, what)
    if not norm.ops and module is not None and module.kind == WRITTEN_OUT:
        return Refused(Reason.FUNCTIONAL, "arithmetic inside a forward, not a layer of its own")
    if not norm.ops and module is not None and module.role == "custom_norm" and module.calls:
        return Refused(Reason.CUSTOM_FORWARD, f"{module.kind} has a forward of its own")
    if not norm.ops and _is_read(norm, graph):
        return Refused(Reason.FUNCTIONAL, "forward reads its numbers, and does not call the layer")
    if not norm.ops:
        return Refused(Reason.NOT_OBSERVED, "it did not run on the example input")
    if held := norm.ops[0].attrs.get("unregistered"):
        what = f"a {held} that a list or another object holds, and that is no layer of the model"
        return Refused(Reason.FUNCTIONAL, what)
    if module is None or not module.role:
        return Refused(Reason.FUNCTIONAL, "a function call inside forward, not a layer of its own")
    if module.role == "scripted":
        return Refused(Reason.SCRIPTED, "it belongs to a TorchScript module")
    if any(op.scope != norm.name for op in norm.ops) and module.role != "custom_norm":
        return Refused(Reason.FUNCTIONAL, "forward calls its function, or its own forward, and not the layer")
    if module.role == "custom_norm" and norm.ops[0].attrs.get("elementwise"):
        return Refused(Reason.CUSTOM_FORWARD, "it normalises each element on its own (spatial=0), no channel")
    if module.role == "custom_norm":
        return Refused(Reason.CUSTOM_FORWARD, f"{module.kind} has a forward of its own")
    if module.hooked:
        return Refused(Reason.HOOKED, "a hook is registered on it")
    op = norm.ops[0]
    if op.attrs["training"] or ("running_mean" not in op.inputs and "map" not in op.attrs):
        return Refused(Reason.BATCH_STATISTICS, "it normalises by the statistics of each batch")
    if module.left_in_train:
        return Refused(Reason.BATCH_STATISTICS, "it was left in train mode in a model in eval mode")
    return _read_own_map(norm, op, graph) if "map" in op.attrs else _read_affine(norm, op, graph, norm_of)


def _is_read(norm: Norm, graph: Graph) -> bool:
    stored = {f"{norm.name}.{role}" for role in _STORED}
    return any(value.readers for value in graph.values if value.handle in stored)


def _is_quantized(norm: Norm, graph: Graph) -> bool:
    """Whether it is a layer of torch.ao, for integers or for training towards them, or stands in one."""
    owners = (norm.name, norm.name.rpartition(".")[0])
    return any(
        name in graph.modules and graph.modules[name].kind.startswith("torch.ao.nn.") for name in owners
    )


def _read_own_map(norm: Norm, op: Op, graph: Graph) -> Refused | None:
    """Of a module of a user's own class: what it computes names its tensors itself."""
    found: Affine = op.attrs["map"]
    calls = {one.id for one in norm.ops}
    for value in (graph.input(op, role) for role in op.reads if role != "input"):
        other = next((reader for reader, _ in value.readers if reader not in calls), None)
        if other is not None:
            return Refused(Reason.WEIGHT_SHARED, f"{graph.ops[other].label} reads its {value.handle} too")
    if not is_finite((found.scale, found.shift)):
        return Refused(Reason.BAD_STATISTICS, "its factors or summands are not finite")
    norm.affine = found
    return None


def _read_affine(norm: Norm, op: Op, graph: Graph, norm_of: dict[int, Norm]) -> Refused | None:
    tensors = {
        role: graph.constant(graph.input(op, role))
        for role in ("weight", "bias", "running_mean", "running_var")
        if role in op.inputs
    }
    for role, tensor in tensors.items():
        if tensor is None or not graph.input(op, role).handle:
            value = graph.input(op, role)
            fed = value.producer is None and not value.constant
            how = "an input of the model, which a caller may replace" if fed else "computed, not stored"
            return Refused(Reason.WEIGHT_COMPUTED, f"its {role} is {how}")
        for reader, _ in graph.input(op, role).readers:
            other = norm_of.get(reader)
            if other is None or other.name not in graph.modules:
                what = graph.ops[reader].label
                return Refused(Reason.WEIGHT_SHARED, f"{what} reads its {role} too")
    mean, variance = tensors["running_mean"], tensors["running_var"]
    assert mean is not None and variance is not None
    scale, shift = batch_norm_affine(
        tensors.get("weight"), tensors.get("bias"), mean, variance, op.attrs["eps"]
    )
    least, largest = torch.aminmax(variance.detach())
    if not (is_finite((scale, shift)) and 0 <= float(least) <= float(largest) < math.inf):
        return Refused(Reason.BAD_STATISTICS, _what_is_bad(tensors))
    norm.affine = Affine(scale, shift, ("bn", norm.name))
    return None


def _what_is_bad(tensors: Mapping[Any, Tensor | None]) -> str:
    """The first tensor that holds what no BatchNorm may hold, and at which channel."""
    for role, tensor in tensors.items():
        if tensor is None:
            continue
        values = tensor.detach().double()  # float8 has no comparisons
        odd = ~torch.isfinite(values)
        if role == "running_var":
            odd |= values < 0
        if bool(odd.any()):
            channel = int(odd.nonzero()[0])
            number = float(tensor.detach()[channel])
            negative = " (negative)" if number < 0 else ""
            return f"{role} is {number:g}{negative} at channel {channel}"
    return "running_var + eps is zero"
