"""BatchNorms of any class: told by what they compute, counted once, with the reason that is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from tests.fold_zoo import enliven


class Stored(nn.Module):
    """Four tensors, and a forward of its own."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.eps = run, 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def at_once(m: Any, x: Tensor) -> Tensor:
    scale = m.weight * (m.running_var + m.eps).rsqrt()
    shift = m.bias - m.running_mean * scale
    return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))


def by_function(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


def by_the_mode(m: Any, x: Tensor) -> Tensor:
    mean, variance = (x.mean((0, 2, 3)), x.var((0, 2, 3))) if m.training else (m.running_mean, m.running_var)
    return F.batch_norm(x, mean, variance, m.weight, m.bias, eps=m.eps)


class Subclass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("norm", [at_once, by_function, by_the_mode, Subclass])
def test_a_batch_norm_of_ones_own_folds(norm: Any) -> None:
    torch.manual_seed(0)
    own = norm(4) if norm is Subclass else Stored(norm)
    model = enliven(nn.Sequential(nn.Conv2d(3, 4, 3), own, nn.ReLU()).double().eval())
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    result = bntool.fold(model, x)
    assert ([site.bn for site in result.plan.fold_sites], type(result.model[1])) == (["1"], nn.Identity)
    # 27 products, their sum and the map, each rounded once
    assert (result.model(x) - model(x)).abs().max() < 64 * torch.finfo(torch.float64).eps * model(
        x
    ).abs().max()


class Through(nn.Module):
    """Calls its BatchNorm through something else."""

    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.call = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x))


def unregistered(m: Any) -> Any:
    """In a list that the model does not know of."""
    held = [m.bn]
    del m.bn
    m.held = held
    return lambda x: held[0](x) * 1


@pytest.mark.parametrize(
    ("hold", "name", "why"),
    [
        (lambda m: lambda x: m.bn(x) * 1, "bn", "called through a lambda or an object"),
        (unregistered, "batch_norm", "that a list or another object holds"),
    ],
)
def test_one_that_no_copy_has_is_counted_once(hold: Any, name: str, why: str) -> None:
    plan = bntool.plan_fold(Through(hold).eval(), torch.randn(1, 3, 7, 7))
    assert [skip.name for skip in plan.skips] == [name]
    assert why in plan.skips[0].detail


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_one_of_integers_is_kept_as_quantized() -> None:
    model = nn.Sequential(nnq.Quantize(0.1, 0, torch.quint8), nnq.BatchNorm2d(3), nnq.DeQuantize()).eval()
    plan = bntool.plan_fold(model, torch.randn(1, 3, 7, 7))
    assert [(skip.name, skip.reason.value) for skip in plan.skips] == [("1", "quantized")]
    conv = nn.Sequential(nnq.Quantize(0.1, 0, torch.quint8), nnq.Conv2d(3, 4, 3), nnq.DeQuantize()).eval()
    assert bntool.plan_fold(conv, torch.randn(1, 3, 7, 7)).skips == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range")
def test_behind_fake_quantisation_it_runs_on_data() -> None:
    """Such an operator writes to its ranges and returns something else."""
    ranges = {"scale": torch.ones(1), "zero_point": torch.zeros(1, dtype=torch.int32)}

    class Faked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            on, low, high = torch.ones(1, dtype=torch.int64), torch.full((1,), -9.0), torch.full((1,), 9.0)
            held = [tensor.clone() for tensor in (low, high, ranges["scale"], ranges["zero_point"])]
            return torch.fused_moving_avg_obs_fake_quant(x, on, on, *held, 0.01, 0, 255, -1)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Faked(), nn.BatchNorm2d(4), nn.ReLU()).eval()
    plan = bntool.plan_fold(enliven(model), torch.randn(1, 3, 7, 7))
    assert [(skip.name, skip.reason.value) for skip in plan.skips] == [("2", "unknown-op")]


class ActivatedByChildren(nn.BatchNorm2d):
    """As libraries copy timm's: the function, then what its children do."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


def test_one_with_an_activation_as_its_child_leaves_that_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedByChildren(4, nn.SiLU()), nn.Conv2d(4, 2, 1)).double()
    enliven(model.eval())
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    result = bntool.fold(model, x)
    assert (len(result.sites), type(result.model[1])) == (1, nn.SiLU)
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)


def test_a_layer_that_the_forward_puts_into_a_new_sequential_is_still_a_layer() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for stage in (nn.Sequential(self.conv, self.bn, nn.ReLU()), self.last):
                x = stage(x)
            return x

    model, x = enliven(Stages().double().eval()), torch.randn(1, 3, 7, 7, dtype=torch.float64)
    result = bntool.fold(model, x)
    assert [site.bn for site in result.plan.fold_sites] == ["bn"]
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
