"""Planning takes work in proportion to the ops: counted in calls, which no busy machine moves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.surgery.fold_modules import apply_fold


class _Net(nn.Module):
    """Units of a convolution and a BatchNorm, wired by `wiring`."""

    def __init__(self, units: int, wiring: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(units))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(units))
        self.first, self.last = nn.BatchNorm2d(2), nn.BatchNorm2d(2 * units)
        for norm in (*self.norms, self.first, self.last):
            nn.init.constant_(norm.weight, 1.5)
            nn.init.constant_(norm.bias, 0.5)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def _chain(net: Any, x: Tensor) -> Tensor:
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = torch.relu(norm(conv(x)))
    return x


def _residual(net: Any, x: Tensor) -> Tensor:
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = x + torch.relu(norm(conv(x)))
    return x


def _branches(net: Any, x: Tensor) -> Tensor:
    x = net.first(torch.relu(x))
    return net.last(torch.cat([torch.max_pool2d(conv(x), 1) for conv in net.convs], 1))


def _written_over_and_over(net: Any, x: Tensor) -> Tensor:
    y = net.norms[0](net.convs[0](x))
    for _ in net.convs:
        y.relu_()
    return y


def _one_layer_again_and_again(net: Any, x: Tensor) -> Tensor:
    for _ in net.convs:
        x = torch.relu(net.norms[0](net.convs[0](x)))
    return x


def _calls(units: int, wiring: Callable[[Any, Tensor], Tensor]) -> int:
    """Calls and steps of generators, Python's and C's, in observing, planning and applying."""
    model = _Net(units, wiring).eval()
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        plan = plan_fold(observe(model, Inputs((torch.rand(1, 2, 2, 2),))).graph)
        apply_fold(model, plan)
    finally:
        sys.setprofile(before)
    assert plan
    return count


@pytest.mark.parametrize(
    "wiring", [_chain, _residual, _branches, _written_over_and_over, _one_layer_again_and_again]
)
def test_twice_the_ops_take_twice_the_work(wiring: Callable[[Any, Tensor], Tensor]) -> None:
    _calls(8, wiring)  # what is done once for each class and operator
    few, many, more = (_calls(units, wiring) for units in (50, 100, 200))
    # what is done once a net only makes it less than twice; a part that grows with the square makes it four
    assert (more - many) / (many - few) == pytest.approx(2, rel=0.05)
