"""Carry out a merge on tensors: the numbers of the one convolution that parallel branches become."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bntool.affine import Leaf, evaluate
from bntool.laws.merging import Term, added_up
from bntool.plan import Branch, Merge


def merged(merge: Merge, tensor: Callable[[str], Tensor | None], leaf: Leaf) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, in float64, from the branches' tensors as `tensor` finds them by their handles."""

    def term(branch: Branch) -> Term:
        scale, shift = evaluate(branch.map, leaf)
        weight = tensor(branch.weight) if branch.weight else None
        bias = tensor(branch.bias) if branch.bias else None
        return weight, bias, branch.window, scale, shift

    weight, bias = added_up((term(branch) for branch in merge.branches), merge.window)
    return weight, (bias.expand(weight.shape[0]) if merge.bias else None)


def cast_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The storage type and device of `like`, rounded once; its memory format too."""
    made = tensor.to(like.dtype).to(like.device)
    if made.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return made.contiguous(memory_format=torch.channels_last)
    return made.contiguous()
