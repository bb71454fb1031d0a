"""A branch on numbers that the example does not take: other values are tried, and may take it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.core.reasons import Reason
from bntool.graph.dataflow import READS_NUMBERS

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    """conv → (sigmoid, where the input is such) → BatchNorm."""

    def __init__(self, branches: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.branches = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), branches
        self.bn.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y.sigmoid() if self.branches(x) else y)


@pytest.mark.parametrize(
    "branches",
    [
        lambda x: x.mean() > 5,  # byte images
        lambda x: x.flatten()[0].item() < -20,
        lambda x: bool((x.abs() < 0.1).all()),
        lambda x: not x.any(),
    ],
)
def test_a_branch_that_other_values_take_is_seen(branches: Callable[[Tensor], object]) -> None:
    result = bntool.fold(Branching(branches).eval(), X)
    assert [skip.reason for skip in result.skips] == [Reason.NONLINEAR]
    assert READS_NUMBERS in result.plan.notes


def test_a_branch_that_all_of_them_take_alike_is_folded_and_said() -> None:
    result = bntool.fold(Branching(lambda x: x.max() > 1e6).eval(), X)
    assert [site.bn for site in result.sites] == ["bn"]
    assert READS_NUMBERS in result.plan.notes
