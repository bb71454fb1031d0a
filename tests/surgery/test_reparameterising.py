"""Blocks that merge their own branches: whichever of their methods does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bntool
from bntool.surgery.reparameterising import find_blocks
from tests.fold_zoo import enliven


class Rep(nn.Module):
    """A convolution beside an identity branch, each with its BatchNorm, and a right merge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.idbn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "merged"):
            return self.merged(x)
        return self.bn(self.conv(x)) + self.idbn(x)

    def switch_to_deploy(self) -> None:
        scales = [n.weight / (n.running_var + n.eps).sqrt() for n in (self.bn, self.idbn)]
        weight = self.conv.weight * scales[0].view(-1, 1, 1, 1) + torch.diag(scales[1]).view(4, 4, 1, 1)
        bias = sum(n.bias - n.running_mean * s for n, s in zip((self.bn, self.idbn), scales, strict=True))
        self.merged = nn.Conv2d(4, 4, 1)
        self.merged.weight.data, self.merged.bias.data = weight.detach(), bias.detach()
        del self.conv, self.bn, self.idbn


class GivesTensors(Rep):
    def reparameterize(self) -> tuple[Tensor, Tensor]:
        return self.conv.weight, self.bn.bias


class Fails(Rep):
    def reparameterize(self) -> None:
        raise RuntimeError("not for this block")


class Unmerged(Rep):
    def reparameterize(self) -> Any:
        return self


def test_a_method_of_the_same_name_that_merges_nothing_hides_none_that_does() -> None:
    for cls in (Rep, GivesTensors, Fails, Unmerged):
        model = enliven(nn.Sequential(nn.ReLU(), cls()).eval())
        (block,) = find_blocks(model)
        assert block.method == "switch_to_deploy"
        assert block.norms == ("1.bn", "1.idbn")
        x = torch.randn(2, 4, 5, 5)
        with torch.no_grad():
            apart = (block.merged(x) - model[1](x)).abs().max() / model[1](x).abs().max()
        # one rounding of each weight and of each sum of 5 terms, with room for the order of sums
        assert apart < 16 * torch.finfo(torch.float32).eps


class Wrong(Rep):
    """Forgets what the identity branch adds."""

    def switch_to_deploy(self) -> None:
        super().switch_to_deploy()
        self.merged.bias.data.zero_()


class Fuses(Rep):
    """Under another name, and as a new block."""

    switch_to_deploy = None  # type: ignore[assignment]

    def merge_kernel(self) -> nn.Module:
        Rep.switch_to_deploy(self)
        return self.merged


def test_a_method_of_its_own_that_is_wrong_is_not_used_and_the_law_merges() -> None:
    model = enliven(nn.Sequential(nn.ReLU(), Wrong()).double().eval())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert find_blocks(model, {"1": (2, 4, 5, 5)}) == []
    result = bntool.fold(model, x)
    assert [site.bn for site in result.plan.fold_sites] == ["1.bn", "1.idbn"]
    assert type(result.model[1]) is Wrong
    # two roundings of each of the 8 terms of an output
    assert (result.model(x) - model(x)).abs().max() < 16 * torch.finfo(torch.float64).eps * model(
        x
    ).abs().max()


def test_a_method_of_another_name_and_what_it_returns_is_used() -> None:
    model = enliven(nn.Sequential(nn.ReLU(), Fuses()).eval())
    (block,) = find_blocks(model, {"1": (2, 4, 40, 40)})
    assert (block.method, type(block.merged)) == ("merge_kernel", nn.Conv2d)
