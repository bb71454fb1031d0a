"""What is said of folds that rest on a shift of zero, and of those that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bntool


class WithoutBias(nn.Conv2d):
    """A convolution that uses no bias, whatever its parameters say."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, None, self.stride, self.padding)


def test_a_layer_with_no_place_for_a_bias_takes_in_an_untrained_batchnorm_alone() -> None:
    model = nn.Sequential(WithoutBias(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    (site,) = bntool.fold(model, torch.randn(1, 3, 8, 8)).sites
    assert site.untrained.startswith("custom-forward")


def test_a_layer_right_before_takes_in_any_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    (site,) = bntool.fold(model, torch.randn(1, 3, 8, 8)).sites
    assert not site.untrained
