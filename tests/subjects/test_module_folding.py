"""Folding a module: what one set of sizes cannot tell, and blocks that merge their own branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bntool
from bntool.core.reasons import Reason
from bntool.observe.eager import observe
from bntool.subjects import elsewhere


class RowsOfPixels(nn.Module):
    """Takes (N, C, H, W) for (N, H·W, C) without a permutation: true only while H = W = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=64, padding=1)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        rows = y.reshape(y.shape[0], -1, 4).reshape(-1, 4)
        return self.bn(rows)


class Flat(nn.Module):
    """A flatten behind a global pool keeps the channels, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.flatten(nn.functional.adaptive_avg_pool2d(self.conv(x), 1), 1))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                n = norm.num_features
                norm.running_mean.copy_(torch.randn(n, generator=generator))
                norm.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                norm.weight.copy_(torch.randn(n, generator=generator))
                norm.bias.copy_(torch.randn(n, generator=generator))
    return model.eval()


def same(model: nn.Module, folded: nn.Module, image: Tensor) -> bool:
    """In float64, where the layers of these nets leave about 1e-15."""
    with torch.no_grad():
        expected, got = model(image.double()), folded(image.double())
    return bool((expected - got).abs().max() <= 1e-12 * expected.abs().max())


class AddsWhatItRead(nn.Module):
    """Makes a tensor of numbers from its data, in a way that no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + torch.tensor([x.mean(), x.amax()]).view(1, 2, 1, 1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.wide_bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.thin, self.thin_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.one: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.one is not None:
            return self.one(x)
        return self.wide_bn(self.wide(x)) + self.thin_bn(self.thin(x))

    def reparameterize(self) -> None:
        wide = fuse_conv_bn_eval(self.wide, self.wide_bn)
        thin = fuse_conv_bn_eval(self.thin, self.thin_bn)
        wide.weight += nn.functional.pad(thin.weight, (1, 1, 1, 1))
        wide.bias += thin.bias
        self.one = wide
        del self.wide, self.wide_bn, self.thin, self.thin_bn


class ReachesIntoItsBlock(nn.Module):
    """Reads a weight that is gone once the block has merged its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.block.thin.weight.mean()


def test_a_block_that_the_model_reaches_into_keeps_its_branches():
    model = randomised(ReachesIntoItsBlock())
    result = bntool.fold(model, torch.randn(2, 4, 8, 8))
    assert [site.into for site in result.plan.fold_sites] == [("block.wide",)]
    assert [skip.reason for skip in result.plan.skips] == [Reason.WEIGHT_SHARED]
    assert any("does not run with its blocks merged" in note for note in result.plan.notes)


def test_a_number_that_the_forward_makes_is_trusted_only_if_it_is_the_same_for_another_input():
    model = randomised(AddsWhatItRead())
    result = bntool.fold(model, torch.randn(2, 3, 8, 8), check="none")
    assert [skip.reason for skip in result.plan.skips] == [Reason.AXIS_MISMATCH]
    assert not result.modified


def test_a_reshape_that_keeps_the_channels_only_at_one_size_is_no_way():
    model = randomised(RowsOfPixels()).double()
    result = bntool.fold(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert [skip.reason for skip in result.skips] == [Reason.AXIS_MISMATCH]
    assert same(model, result.model, torch.randn(2, 3, 192, 192))


def test_a_flatten_behind_a_global_pool_is_one():
    model = randomised(Flat()).double()
    result = bntool.fold(model)
    assert [site.bn for site in result.sites] == ["bn"]
    assert same(model, result.model, torch.randn(3, 3, 40, 56))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_blocks_merge_their_own_branches(name):
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model(name, num_classes=10))
    result = bntool.fold(model, torch.randn(1, 3, 64, 64))
    assert not result.skips
    convolutions = [
        sum(isinstance(m, nn.Conv2d) for m in net.modules())
        for net in (result.model, timm.utils.reparameterize_model(model))
    ]
    assert convolutions[0] <= convolutions[1]
    replayed = bntool.apply(model, bntool.Plan.from_json(result.plan.to_json()))
    state = result.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in replayed.model.state_dict().items())


def test_without_merging_the_branches_stay_and_say_why():
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model("repvgg_a0", num_classes=10))
    result = bntool.fold(model, torch.randn(1, 3, 64, 64), merge=False, check="none")
    assert {skip.reason for skip in result.skips} == {Reason.OUTPUT_USED_ELSEWHERE}
    assert len(result.skips) == 17


class SamePadding(nn.Conv2d):
    """As popular packages write it: pads by itself, and hands on the bias that it may have."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WithoutBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride)


class BiasOfItsOwn(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight)
        return y if self.bias is None else y + 2 * self.bias.view(1, -1, 1, 1)


class NoBiasPlease(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise RuntimeError("no bias, please")
        return F.conv2d(x, self.weight)


class OtherWithBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y if self.bias is None else 2 * y


class BiasTwice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)


class PlainAttribute(nn.Conv2d):
    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        del self.bias
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class WeightUnderAnotherName(nn.Conv2d):
    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.kernel = self.weight
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


@pytest.mark.parametrize(
    "kind",
    [
        SamePadding, WithoutBias, BiasOfItsOwn, NoBiasPlease, OtherWithBias, BiasTwice, PlainAttribute,
        WeightUnderAnotherName,
    ],
)  # fmt: skip
def test_a_layer_with_a_forward_of_its_own_gets_a_bias_only_where_it_uses_one(kind: type[nn.Conv2d]) -> None:
    model = randomised(nn.Sequential(kind(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())).double()
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = bntool.fold(model, image, check="none")
    assert same(model, result.model, image)
    assert model[0].bias is None
    if kind is SamePadding:
        assert [site.bn for site in result.sites] == ["1"]
    else:
        assert [skip.reason for skip in result.skips] == [Reason.CUSTOM_FORWARD]


class Halves(nn.Module):
    """Instance and batch normalisation, each of one half (Pan et al. 2018, IBN-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.instance, self.batch = nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.conv(x), [4, 4], 1)
        return torch.cat((self.instance(first.contiguous()), self.batch(second.contiguous())), 1).relu()


@pytest.mark.parametrize("batch", [1, 2])
def test_what_runs_at_some_sizes_only_and_changes_nothing_makes_no_other_fold(batch: int) -> None:
    model, image = randomised(Halves()).double(), torch.randn(batch, 3, 8, 8, dtype=torch.float64)
    result = bntool.fold(model, image)
    assert [site.bn for site in result.sites] == ["batch"]
    assert same(model, result.model, image)


def test_a_fold_through_places_that_a_size_decides_is_observed_twice() -> None:
    class RolledByItsWidth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x).roll(x.shape[2], 1))

    model, image = randomised(RolledByItsWidth()).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    result = bntool.fold(model, image, check="none")
    assert [skip.reason for skip in result.skips] == [Reason.AXIS_MISMATCH]
    assert same(model, result.model, torch.randn(1, 3, 9, 9, dtype=torch.float64))


class Tokens(nn.Module):
    """A BatchNorm over the features of tokens; the batch is flattened by axes or by numbers."""

    def __init__(self, by_axes: bool) -> None:
        super().__init__()
        self.linear, self.bn, self.by_axes = nn.Linear(4, 6), nn.BatchNorm1d(6), by_axes

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x)
        return self.bn(tokens.flatten(0, 1) if self.by_axes else tokens.reshape(-1, 6)).reshape_as(tokens)


@pytest.mark.parametrize("by_axes", [True, False])
def test_only_what_is_told_numbers_is_observed_on_a_second_size(
    by_axes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[int] = []
    monkeypatch.setattr(elsewhere, "observe", lambda *a, **k: seconds.append(1) or observe(*a, **k))
    model, tokens = randomised(Tokens(by_axes)).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    result = bntool.fold(model, tokens, check="none")
    assert len(result.sites) == 1
    assert bool(seconds) != by_axes
    for shape in ((1, 5, 4), (3, 4, 4), (4, 6, 4)):
        assert same(model, result.model, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("axes", [(), (0,), ((0, 1),)])
def test_an_axis_that_is_squeezed_away_only_where_its_size_is_one(axes: tuple[Any, ...]) -> None:
    class Squeezed(nn.Module):
        """With a batch of one the BatchNorm is over features, with a larger one over tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.linear(x).squeeze(*axes))

    model = randomised(Squeezed()).double()
    result = bntool.fold(model, torch.randn(1, 4, 5, dtype=torch.float64), check="none")
    for batch in (1, 2):
        assert same(model, result.model, torch.randn(batch, 4, 5, dtype=torch.float64))


class RowsFirst(nn.Module):
    """A linear layer reads (H, C, W): of another image of the same area it reads other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(self.conv(x).relu()).permute(0, 2, 1, 3).flatten(1))


@pytest.mark.parametrize("sides", [(4, 4), (2, 8)])
def test_a_layer_of_a_fixed_width_is_observed_on_an_image_of_the_same_area(sides: tuple[int, int]) -> None:
    model, image = randomised(RowsFirst()).double(), torch.randn(2, 3, *sides, dtype=torch.float64)
    result = bntool.fold(model, image)
    assert [skip.reason for skip in result.skips] == [Reason.AXIS_MISMATCH]


class LinearOfItsOwn(nn.Module):
    """No `nn.Linear`: a weight, a bias that may be None, and the functional call; or one that ignores it."""

    def __init__(self, uses_bias: bool) -> None:
        super().__init__()
        self.weight, self.uses_bias = nn.Parameter(torch.randn(4, 3)), uses_bias
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias if self.uses_bias else None)


@pytest.mark.parametrize("uses_bias", [True, False])
def test_a_linear_layer_of_any_class_gets_the_bias_that_it_would_use(uses_bias: bool) -> None:
    model = nn.Sequential(LinearOfItsOwn(uses_bias), nn.BatchNorm1d(4), nn.Tanh()).eval()
    model[1].running_mean.normal_()
    x = torch.randn(5, 3)
    result = bntool.fold(model, x)
    assert [skip.reason for skip in result.skips] == ([] if uses_bias else [Reason.CUSTOM_FORWARD])
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("gamma", [1.0, -1.0])
def test_where_a_sign_decides_the_reason_is_the_sign(gamma: float) -> None:
    """relu -> BatchNorm -> sum: the scale goes up and the shift down, unless a channel has γ < 0."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(4, 8, 1), nn.Conv1d(4, 8, 1), nn.Conv1d(8, 5, 1)
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.bn(torch.relu(self.a(x))) + torch.tanh(self.b(x)))

    model = Step().eval()
    model.bn.running_mean.normal_()
    model.bn.weight.data[3] = gamma
    result = bntool.fold(model, torch.randn(1, 4, 9))
    assert [skip.reason for skip in result.skips] == ([] if gamma > 0 else [Reason.NEGATIVE_SCALE])
