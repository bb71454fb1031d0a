"""Nets that are right at one size, batch or value and wrong at another: never wrong, always a verdict."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.core.errors import CheckFailed, ObserveError, StateError
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.base import Checking
from bntool.subjects.proving import ModuleProof


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                n = norm.num_features
                norm.running_mean.copy_(torch.randn(n, generator=generator))
                norm.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                norm.weight.copy_(torch.rand(n, generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(n, generator=generator))
    return model.double().eval()


class ConvNorm(nn.Module):
    """A convolution and a BatchNorm; `between` and `around` say how forward joins them."""

    def __init__(self, join: Callable[[ConvNorm, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(8)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def padded_to_even(net: ConvNorm, x: Tensor) -> Tensor:
    y = net.bn(F.relu(net.conv(x)))
    return net.other(F.pad(y, (0, 1, 0, 1)) if y.shape[-1] % 2 else y)


def padded_by_size(net: ConvNorm, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(F.pad(y, [0, y.shape[-1] % 2, 0, 0]))


TRICKS: dict[str, Callable[[ConvNorm, Tensor], Tensor]] = {
    "padded to even sides": padded_to_even,
    "padded by an amount from the size": padded_by_size,
    "scaled by the width": lambda n, x: n.bn(n.conv(x) * x.shape[-1] ** -0.5),
    "scaled by the batch": lambda n, x: n.bn(n.conv(x) / x.shape[0]),
    "branch on the width": lambda n, x: n.bn(n.conv(x)) if x.shape[-1] <= 64 else n.conv(x),
    "first sample apart": lambda n, x: torch.cat([n.bn(n.conv(x)[:1]), n.conv(x)[1:]]),
    "tiles": lambda n, x: torch.cat([n.bn(n.conv(x).split(62, 3)[0]), *n.conv(x).split(62, 3)[1:]], 3),
    "number through numpy": lambda n, x: n.bn(n.conv(x) * float(np.round(np.abs(x.numpy()).max()))),
    "number through a list": lambda n, x: n.bn(n.conv(x) * len((x[0, 0] > 0).nonzero().tolist())),
    "attributes of the norm": lambda n, x: n.bn(n.conv(x)) * n.bn.num_features,
    "asks for its class": lambda n, x: n.bn(n.conv(x)) if isinstance(n.bn, nn.BatchNorm2d) else x,
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_holds_on_one_input_only_is_not_folded(trick: str) -> None:
    model = randomised(ConvNorm(TRICKS[trick]))
    result = bntool.fold(model)
    assert [skip.name for skip in result.skips] == ["bn"]
    for shape in ((1, 3, 64, 64), (2, 3, 97, 97), (3, 3, 128, 96)):
        image = 5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(model(image), result.model(image))


def test_one_norm_that_cannot_be_proved_does_not_keep_the_others() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = ConvNorm(TRICKS["attributes of the norm"])
            self.second = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    result = bntool.fold(randomised(Two()))
    assert [site.bn for site in result.sites] == ["second.1"]
    assert [(skip.name, skip.reason) for skip in result.skips] == [("first.bn", Reason.NOT_PROVED)]
    assert "num_features" in result.skips[0].detail


def pooled(gamma: float) -> nn.Module:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)))
    with torch.no_grad():
        model[2].weight.fill_(gamma)
    return model


def test_a_plan_replayed_where_it_does_not_hold_is_a_failed_check() -> None:
    plan = bntool.plan_fold(pooled(1.0))
    assert bntool.apply(pooled(0.5), plan).modified
    with pytest.raises(CheckFailed, match="differs"):
        bntool.apply(pooled(-1.0), plan)


def test_a_plan_replayed_on_bad_statistics_is_a_bad_state() -> None:
    plan = bntool.plan_fold(pooled(1.0))
    bad = pooled(1.0)
    with torch.no_grad():
        bad[2].running_var.fill_(-1.0)
    with pytest.raises(StateError, match="not finite"):
        bntool.apply(bad, plan, check="none")


@functools.lru_cache
def grid(width: int) -> Tensor:
    return torch.linspace(0, 1, width)


@pytest.mark.parametrize("surgery", [bntool.fold, bntool.insert])
def test_a_tensor_that_forward_keeps_in_a_global_can_still_be_trained_with(surgery: Any) -> None:
    grid.cache_clear()
    model = randomised(
        ConvNorm(lambda n, x: F.relu(n.other(F.relu(n.bn(n.conv(x * grid(x.shape[-1])))))))
    ).float()
    surgery(model)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.parametrize("surgery", [bntool.fold, bntool.insert])
def test_under_inference_mode_the_result_can_be_trained(surgery: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    with torch.inference_mode():
        result = surgery(model)
    assert not any(p.is_inference() for p in result.model.parameters())
    result.model.train()(torch.randn(2, 3, 16, 16)).sum().backward()


def test_tensors_in_lists_and_attributes_are_the_results_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.kept = [self.conv.weight]
            self.average = torch.zeros(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) + self.average[:, None, None]

    model = Tied()
    inserted: Any = bntool.insert(model).model
    assert inserted.kept[0] is inserted.conv.weight
    assert inserted.kept[0] is not model.conv.weight
    assert inserted.average.data_ptr() != model.average.data_ptr()


def test_a_scripted_convolution_takes_nothing_in() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(nn.Conv2d(3, 8, 3).double())
        model = randomised(nn.Sequential(scripted, nn.BatchNorm2d(8)))
        result = bntool.fold(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert [skip.reason for skip in result.skips] == [Reason.SCRIPTED]


def test_a_layer_that_is_compiled_takes_its_batch_norm_in() -> None:
    compiled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own use of TorchScript
        compiled[0] = torch.compile(compiled[0])
    assert [site.bn for site in bntool.fold(compiled).plan.fold_sites] == ["1"]


def test_a_model_without_numbers_says_so() -> None:
    with pytest.raises(StateError, match="meta device"):
        bntool.fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to("meta"))


def test_a_norm_of_other_channels_is_named_with_both_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(7)).eval()
    with pytest.raises(ObserveError, match="7 channels and is given 8") as failure:
        bntool.fold(model, torch.randn(1, 3, 16, 16))
    assert failure.value.where == "2"


def test_a_forward_that_differentiates_is_no_question_of_the_input() -> None:
    def slope(net: ConvNorm, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            found: Tensor = torch.autograd.grad(net.bn(net.conv(z)).sum(), z)[0]
        return found

    with pytest.raises(ObserveError, match="differentiates"):
        bntool.fold(randomised(ConvNorm(slope)), torch.randn(1, 3, 16, 16, dtype=torch.float64))


def test_the_noise_of_a_float64_model_is_derived_since_nothing_measures_it() -> None:
    """Beside its own float64 run it shows none: the fold of this one differs by 1.5e-15."""
    torch.manual_seed(21)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    model = randomised(nn.Sequential(*layers, nn.BatchNorm2d(4)))
    result = bntool.fold(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert len(result.sites) == 2
    assert all(0 < check.relative < check.limit < 1e-9 for check in result.checks)


class Chaotic(nn.Module):
    """Rounding decides what comes out; the stem's BatchNorm stands beside it, those of the body inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.bn(self.stem(x)))
        return torch.sin(1e12 * self.head(y.mean((2, 3))))


def test_where_rounding_decides_the_output_only_parts_that_hold_a_whole_fold_are_compared() -> None:
    torch.manual_seed(0)
    model = Chaotic().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    result = bntool.fold(model, torch.randn(1, 3, 6, 6))
    folded = [site.bn for site in result.plan.fold_sites]
    assert folded[0] == "bn"
    assert all(check.passed for check in result.checks)
    # How far rounding moves this network differs by processor: on some nothing of the body can be compared.
    if folded == ["bn", "body.1"]:
        assert any("parts" in check.detail for check in result.checks)
    else:
        (kept,) = result.plan.skips
        assert (kept.name, kept.reason) == ("body.1", "not-proved")
        assert "nothing is proved" in kept.detail


def test_a_forward_of_two_inputs_asks_for_both() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.bn(self.conv(left)) + self.bn(self.conv(right))

    with pytest.raises(ObserveError, match="missing 1 required positional argument: 'right'") as failure:
        bntool.fold(Two().eval())
    assert failure.value.next_step.startswith("give every argument of forward an input: --input ")


class _OfSidesByFour(nn.Module):
    """A U-Net in short: sides that four does not divide, or any but those given, do not fit together."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.only = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), only

    def forward(self, x: Tensor) -> Tensor:
        assert self.only in (None, x.shape[-1]), "of another size"
        y = self.norm(self.conv(x))
        return torch.cat([y, F.interpolate(F.max_pool2d(y, 4), scale_factor=4.0)], 1) * (3 - min(len(x), 2))


def test_a_size_that_the_model_does_not_take_is_no_end_of_the_proof_elsewhere() -> None:
    model = randomised(_OfSidesByFour()).float().eval()
    proof = ModuleProof(model, observe(model, Inputs.of(torch.randn(1, 3, 32, 32))), Checking(full=False))
    assert proof.elsewhere is not None
    assert proof.elsewhere.inputs[0].shapes() == "2x3x8x8"


def test_where_the_model_takes_no_other_size_the_row_says_so() -> None:
    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x.view(2, 3, 8, 8)))

    result = bntool.fold(randomised(Rigid()).float().eval(), torch.randn(2, 3, 8, 8))
    assert "not proved on other sizes, since the model takes none of 3x3x41x41" in result.checks[0].detail
    assert (
        "other sizes"
        not in bntool.fold(randomised(_OfSidesByFour()).float().eval(), torch.randn(2, 3, 32, 32))
        .checks[0]
        .detail
    )


def test_the_rows_tell_what_they_ran_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 16, 16)
    own, algebra = bntool.fold(model, x).checks
    assert own.inputs == ("2x3x16x16",)
    assert algebra.inputs != own.inputs
    assert all(shape.startswith("3x3x") for shape in algebra.inputs)
    assert list(own.to_dict()["inputs"]) == ["2x3x16x16"]
