"""A branch that the example does not take, on numbers or sizes: others are tried, and may take it."""

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


@pytest.mark.parametrize(
    "branches",
    [
        lambda x: x.shape[-1] < 10,
        lambda x: len(x) == 1,
        lambda x: x.shape[0] * x.shape[-1] < 20,
        lambda x: len(x) > 2,
        lambda x: x.shape[-1] % 2,
        lambda x: x.size(2) != x.size(3),
        lambda x: x.numel() > 2000,
    ],
)
def test_a_branch_that_other_sizes_take_is_seen(branches: Callable[[Tensor], object]) -> None:
    result = bntool.fold(Branching(branches).eval(), X)
    assert not result.sites
    assert result.skips[0].reason in (Reason.NONLINEAR, Reason.NOT_PROVED)


def test_a_branch_that_all_of_them_take_alike_is_folded_and_said() -> None:
    result = bntool.fold(Branching(lambda x: x.max() > 1e6).eval(), X)
    assert [site.bn for site in result.sites] == ["bn"]
    assert READS_NUMBERS in result.plan.notes


class Choosing(nn.Module):
    """The same ops either way, on one of two weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.bn.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.two if x.mean() > 5 else self.one
        return self.bn(nn.functional.conv2d(x, chosen.weight, chosen.bias))


def test_another_weight_is_another_path() -> None:
    result = bntool.fold(Choosing().eval(), X)
    wide = 255 * X
    with torch.no_grad():
        torch.testing.assert_close(result.model(wide), Choosing().eval()(wide), rtol=1e-4, atol=1e-4)
    assert READS_NUMBERS in result.plan.notes
