"""How a linear layer takes an affine map into its weights, and when it may.

Layouts of a weight, as the layers of PyTorch and ONNX keep them:

    conv        (out, in/groups, *kernel)     also Linear, with no kernel axes: `linear` (out, in)
    transposed  (in, out/groups, *kernel)
    matmul      (in, out)                     x @ W
    norm        (C,)                          γ of a BatchNorm: a depthwise 1×1 convolution

At the output, y' = s·y + t: W' = s·W along the output axis, b' = s·b + t.
At the input, y = f(s·x + t): W' = W·s along the input axis, b' = b + Σ W·t over inputs and kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op
from bntool.laws.base import Context, Refused, along, constant_over

TAKERS = frozenset({"conv", "linear", "matmul"})


def layout_of(op: Op) -> str:
    if op.kind == "conv":
        return "transposed" if op.attrs["transposed"] else "conv"
    return {"linear": "linear", "matmul": "matmul", "batch_norm": "norm"}[op.kind]


def channel_axis(op: Op, rank: int) -> int:
    """The axis of the layer's data along which its channels lie."""
    if op.kind == "conv":
        return rank - int(op.attrs["dims"]) - 1
    return rank - 1 if op.kind in ("linear", "matmul") else int(op.attrs["axis"])


def output_demand(context: Context, op: Op, demand: Affine) -> Affine:
    """The demand on a layer's output as vectors of output channels; refused where it is anything else."""
    _require_matrix(context, op)
    shape = context.graph.output(op).shape
    return _vector(op, along(demand, len(shape), op.label), shape)


def input_map(context: Context, op: Op, affine: Affine) -> Affine:
    """The map on a layer's input as vectors of input channels; refused where a border would differ."""
    _require_matrix(context, op)
    shape = context.graph.input(op).shape
    vector = _vector(op, along(affine, len(shape), op.label), shape)
    if op.kind == "conv" and vector.has_shift and not _border_free(context, op):
        raise Refused(Reason.SHIFT_AT_PADDING, f"{op.label} pads with zeros, which have no shift")
    return vector


def _require_matrix(context: Context, op: Op) -> None:
    """A product x @ W is a linear layer where W is one matrix, not a vector or a batch of them."""
    if op.kind == "matmul" and len(context.graph.input(op, "weight").shape) != 2:
        raise Refused(Reason.UNKNOWN_OP, f"{op.label} multiplies by something other than one matrix")


def _vector(op: Op, affine: Affine, shape: tuple[int, ...]) -> Affine:
    rank = len(shape)
    axis = channel_axis(op, rank)
    affine = constant_over(affine, [i for i in range(rank) if i != axis], op.label)
    expanded = [1] * rank
    expanded[axis] = shape[axis]
    return affine.then("fill").then("reshape", tuple(expanded), (shape[axis],))


def _border_free(context: Context, op: Op) -> bool:
    """Whether every output sees the same kernel taps, all on real values."""
    kernel = context.graph.input(op, "weight").shape[2:]
    if op.attrs["transposed"]:
        # without overlap or holes every output gets exactly one tap only where the kernel is one
        # and nothing is padded to its output
        single = all(n == 1 for n in (*kernel, *op.attrs["stride"]))
        return single and not any(op.attrs["output_padding"])
    padding = op.attrs["padding"]
    if isinstance(padding, str):
        return padding == "valid" or all(k == 1 for k in kernel)
    return not any(padding)


# -- the arithmetic, in float64 -------------------------------------------------------------------------


def rows(layout: str, weight: Tensor, groups: int, channels: Tensor, side: str) -> Tensor:
    """Per-channel factors shaped to multiply a weight of `layout` along its output or input axis."""
    if layout == "norm":
        return channels
    if layout == "matmul":
        return channels.reshape(1, -1) if side == "output" else channels.reshape(-1, 1)
    if layout not in ("conv", "linear", "transposed"):
        raise ValueError(f"unknown weight layout {layout!r}")
    kernel = (1,) * (weight.dim() - 2)
    if (side == "output") == (layout != "transposed"):
        return channels.reshape(-1, 1, *kernel)
    if groups == 1:
        return channels.reshape(1, -1, *kernel)
    # the other axis counts channels within a group: channel j of group g stands at weight[rows of g, j]
    per_group = channels.reshape(groups, 1, -1)
    per_row = per_group.expand(groups, weight.shape[0] // groups, -1)
    return per_row.reshape(weight.shape[0], -1, *kernel)


def bias_from_input_shift(layout: str, weight: Tensor, groups: int, shift: Tensor) -> Tensor:
    """Σ W·t over input channels and kernel taps, per output channel, in float64.

    weight in `layout`; shift (in,). A transposed convolution is only asked with a kernel of one.
    """
    if layout == "matmul":
        return shift @ weight.double()
    taps = weight.reshape(*weight.shape[:2], -1).sum(-1, dtype=torch.float64)
    per_group = taps.reshape(groups, -1, taps.shape[1])
    if layout == "transposed":
        return (shift.reshape(groups, 1, -1) @ per_group).reshape(-1)
    return (per_group @ shift.reshape(groups, -1, 1)).reshape(-1)
