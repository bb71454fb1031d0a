"""When parallel convolutions over one value, added up, are one convolution, and which.

A convolution reads its input at offsets −p + d·i, i = 0 … k−1, for a padding of p zeros before, a dilation
d and a kernel of k taps; the value itself is one tap of one at offset 0. Convolutions of one stride whose
outputs have one length, whatever the length of the input (p + q − d·(k−1) is the same for all, with q zeros
after), add up tap by tap: the sum has every offset of any of them, and zeros at the rest. A convolution in
groups is one in fewer groups, zeros between (Ding et al. 2021, RepVGG, and 2019, ACNet).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.core.sites import Window
from bntool.graph.dataflow import Op

Term = tuple[Tensor | None, Tensor | None, Window, Tensor, Tensor]
"""Weight and bias of a branch (neither, for the value itself), its window, the scale and shift behind it."""


def window_of(op: Op, kernel: Sequence[int]) -> Window | None:
    """The window of a convolution op; None where it is transposed or its padding depends on the input."""
    dims, padding = int(op.attrs["dims"]), op.attrs["padding"]
    if op.attrs["transposed"]:
        return None
    reach = [d * (k - 1) for d, k in zip(op.attrs["dilation"], kernel, strict=True)]
    if padding == "same":
        if any(s != 1 for s in op.attrs["stride"]) or any(n % 2 for n in reach):
            return None
        padding = tuple(n // 2 for n in reach)
    elif padding == "valid":
        padding = (0,) * dims
    return Window(
        kernel=tuple(kernel),
        stride=tuple(op.attrs["stride"]),
        dilation=tuple(op.attrs["dilation"]),
        before=tuple(padding[:dims]),
        after=tuple(padding[-dims:]),
        groups=int(op.attrs["groups"]),
    )


def identity_window(dims: int, channels: int) -> Window:
    """One tap of one, on the channel's own: the value itself."""
    ones, zeros = (1,) * dims, (0,) * dims
    return Window(ones, ones, ones, zeros, zeros, channels)


def joined(windows: Sequence[Window]) -> Window | None:
    """The smallest window that holds all of them; None where they do not add up to one convolution."""
    first = windows[0]
    if any(w.stride != first.stride for w in windows):
        return None
    kernel, dilation, before, after = [], [], [], []
    for axis in range(len(first.kernel)):
        reaches = [w.dilation[axis] * (w.kernel[axis] - 1) for w in windows]
        starts, ends = [w.before[axis] for w in windows], [w.after[axis] for w in windows]
        if len({a + b - n for a, b, n in zip(starts, ends, reaches, strict=True)}) > 1:
            return None
        steps = [w.dilation[axis] for w in windows if w.kernel[axis] > 1]
        step = math.gcd(*steps, *(start - starts[0] for start in starts)) or 1
        before.append(max(starts))
        after.append(max(ends))
        dilation.append(step)
        kernel.append((max(starts) + max(ends) - starts[0] - ends[0] + reaches[0]) // step + 1)
    groups = math.gcd(*(w.groups for w in windows))
    return Window(tuple(kernel), first.stride, tuple(dilation), tuple(before), tuple(after), groups)


def widened(weight: Tensor, window: Window, target: Window) -> Tensor:
    """The same convolution as one of the target's window.

    weight (out, in/groups, *kernel) of `window`; the result is (out, in/target.groups, *target.kernel).
    """
    rows, per_group = weight.shape[:2]
    width = per_group * window.groups // target.groups
    made = weight.new_zeros((rows, width, *target.kernel))
    row = torch.arange(rows, device=weight.device).reshape(-1, 1)
    first = row // (rows // window.groups) * per_group % width
    places = []
    for k, d, p, d2, p2 in zip(
        window.kernel, window.dilation, window.before, target.dilation, target.before, strict=True
    ):
        start, step = (p2 - p) // d2, d // d2 if k > 1 else 1
        places.append(slice(start, start + step * (k - 1) + 1, step))
    index: tuple[Any, ...] = (row, first + torch.arange(per_group, device=weight.device), *places)
    made[index] = weight
    return made


def added_up(terms: Iterable[Term], target: Window) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution, in float64: Σ s·W in the target's window, and Σ s·b + t."""
    weight: Tensor | None = None
    total = torch.zeros((), dtype=torch.float64)
    for own, bias, window, scale, shift in terms:
        if own is None:
            own = torch.ones((len(scale), 1, *window.kernel), dtype=torch.float64)
        scale, shift = scale.to(own.device), shift.to(own.device)
        part = widened(own.double() * scale.reshape(-1, *(1,) * (own.dim() - 1)), window, target)
        weight = part if weight is None else weight.to(part.device) + part
        total = total.to(part.device) + shift + (0 if bias is None else scale * bias.double().to(own.device))
    assert weight is not None
    return weight, total
