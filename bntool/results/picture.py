"""The model as a report draws it: its layers in the order they ran, and what each BatchNorm computes.

Bounded: of a network of thousands of layers, or of channels, a part is kept and the rest is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from bntool.folding.norms import Norm, find_norms
from bntool.graph.affine import batch_norm_affine
from bntool.graph.dataflow import Graph, Op

MOST_LAYERS = 2000
MOST_CHANNELS = 20_000
_MOST_OF_ONE = 256
_LEAST_OF_ONE = 8
_NAMED_OPS = 3
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
DEAD = 1e-3
"""A channel is dead whose values spread less than this after normalisation and γ, where 1 is usual."""


def layers_of(graph: Graph, count: int) -> dict[str, Any]:
    """The layers in the order they ran, each with what it reads from, and the classes of the modules.

    A layer is one call of a module without children, or a run of operations between such calls (`op`).
    `from` holds indices of earlier layers; it is empty for what reads the model's input alone. Shapes are
    those of the (first) output, with the batch. `count` is how many a summary tells, run or not.
    """
    own = _own_numbers(graph)
    rows: list[dict[str, Any]] = []
    maker: dict[int, int] = {}  # op -> row
    run: tuple[str, int] | None = None
    for op in graph.ops:
        if all(graph.values[value].constant for value in op.outputs):
            continue  # computed from weights alone
        module = graph.modules.get(op.scope)
        is_layer = module is not None and bool(op.scope) and not module.children
        this = (op.scope, op.call if is_layer else -1)
        if run != this or not rows:
            name = op.scope or (op.place if graph.rewirable else "")
            kind = module.kind.rpartition(".")[2] if is_layer and module is not None else ""
            rows.append({"name": name, "kind": kind, "ops": [], "from": []})
            # once, where it first runs, so that the rows sum to the whole; a module with layers inside too
            rows[-1]["parameters"] = own.pop(op.scope, 0)
            rows[-1]["op"] = not op.scope or (module is not None and not is_layer)
            run = this
        _read(graph, op, rows, maker)
    for row in rows:
        kinds = row.pop("ops")
        more = len(kinds) - _NAMED_OPS
        row["kind"] = row["kind"] or ", ".join(kinds[:_NAMED_OPS]) + (f" and {more} more" if more > 0 else "")
    kept = rows[:MOST_LAYERS]
    return {
        "class": graph.model_class.rpartition(".")[2],
        "layers": kept,
        "modules": _containers(graph, kept),
        "left_out": len(rows) - len(kept),
        "count": count,
    }


def norms_of(graph: Graph) -> list[dict[str, Any]]:
    """What every BatchNorm computes, channel by channel: scale s = γ/√(σ²+ε), shift t = β − s·μ, and σ².

    `shown` of the `channels` are in the lists, evenly spread. One without stored statistics has no lists.
    """
    norms = find_norms(graph)
    most = max(_LEAST_OF_ONE, min(_MOST_OF_ONE, MOST_CHANNELS // max(len(norms), 1)))
    return [_figures(norm, graph, most) for norm in norms[: MOST_CHANNELS // _LEAST_OF_ONE]]


def _read(graph: Graph, op: Op, rows: list[dict[str, Any]], maker: dict[int, int]) -> None:
    """Add an operation to the last row."""
    row, here = rows[-1], len(rows) - 1
    maker[op.id] = here
    if op.kind not in row["ops"]:
        row["ops"].append(op.kind)
    if op.outputs:
        row["shape"] = list(graph.output(op).shape)
    for value in op.inputs.values():
        producer = graph.values[value].producer
        at = maker.get(producer) if producer is not None else None
        if at is not None and at != here and at not in row["from"]:
            row["from"].append(at)


def _own_numbers(graph: Graph) -> Counter[str]:
    """By module, the elements of the parameters that stand right in it.

    Where nothing says what is one, of all tensors but running statistics.
    """
    numbers: Counter[str] = Counter()
    told = any(isinstance(tensor, nn.Parameter) for tensor in graph.tensors.values())
    for handle, tensor in graph.tensors.items():
        scope, _, local = handle.rpartition(".")
        if isinstance(tensor, nn.Parameter) if told else local not in _STATISTICS:
            numbers[scope] += tensor.numel()
    return numbers


def _containers(graph: Graph, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The classes of the modules around the layers."""
    names = {""}
    for row in rows:
        parts = row["name"].split(".")
        names |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return {
        name: module.kind.rpartition(".")[2]
        for name, module in graph.modules.items()
        if name in names and module.children
    }


def _figures(norm: Norm, graph: Graph, most: int) -> dict[str, Any]:
    found: dict[str, Any] = {"name": norm.name, "channels": None, "shown": 0, "dead": None}
    if not norm.ops:
        return found
    op = norm.ops[0]
    weight, bias, mean, variance = (
        graph.constant(graph.input(op, role)) if role in op.inputs else None
        for role in ("weight", "bias", "running_mean", "running_var")
    )
    if mean is None or variance is None or mean.is_meta:
        return found
    eps = float(op.attrs["eps"])
    with torch.no_grad():
        scale, shift = batch_norm_affine(weight, bias, mean, variance, eps)
        spread = scale.abs() * variance.detach().to(scale.dtype).clamp(min=0).sqrt()
    channels = len(scale)
    at = torch.arange(min(channels, most)) * channels // max(min(channels, most), 1)
    return {
        "name": norm.name,
        "channels": channels,
        "shown": len(at),
        "eps": eps,
        "dead": int((spread < DEAD).sum()),
        "at": at.tolist() if len(at) < channels else None,
        "scale": _rounded(scale[at]),
        "shift": _rounded(shift[at]),
        "variance": _rounded(variance.detach()[at]),
    }


def _rounded(values: Tensor) -> list[float | None]:
    """Four digits, which is more than a picture shows; None for what is no number."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values.double().tolist()]
