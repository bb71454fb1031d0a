"""Hand-written BatchNorms whatever their tensors are called: each gets a verdict, and goes where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.module_folding import plan_module_fold
from bntool.surgery.replaying import replay_fold

C = 4


class Own(nn.Module):
    """Tensors under the names that `run` asks for, each of `shape`, drawn from (0.5, 1.5)."""

    def __init__(
        self, run: Callable[[Any, Tensor], Tensor], names: str, shape: tuple[int, ...] = (C,)
    ) -> None:
        super().__init__()
        self.run, self.eps = run, 1e-3
        signs = torch.where(torch.rand(shape) < 0.4, -1.0, 1.0)
        for number, name in enumerate(names.split()):
            tensor = torch.rand(shape, dtype=torch.float64) + 0.5
            if number:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor * signs))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.run(self, x)


def c(t: Tensor) -> Tensor:
    return t[None, :, None, None]


def in_place(m: Any, x: Tensor) -> Tensor:
    y = x - c(m.mu)
    y *= c(m.g * torch.rsqrt(m.var + m.eps))
    y += c(m.b)
    return y


def channels_last(m: Any, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1)
    return ((y - m.mu) / (m.var + m.eps).sqrt() * m.g + m.b).permute(0, 3, 1, 2)


def flat(m: Any, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], x.shape[1], -1)
    return F.batch_norm(y, m.mu, m.var, m.g, m.b, False, 0.0, m.eps).view_as(x)


VARIANTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "gamma beta moving": (
        lambda m, x: (
            c(m.gamma) * (x - c(m.moving_mean)) / torch.sqrt(c(m.moving_variance) + 1e-3) + c(m.beta)
        ),
        "gamma beta moving_mean moving_variance",
    ),
    "epsilon outside the root": (
        lambda m, x: (x - c(m.mu)) / (c(m.v).sqrt() + 1e-5) * c(m.w) + c(m.b),
        "w b mu v",
    ),
    "rsqrt": (lambda m, x: (x - c(m.mu)) * torch.rsqrt(c(m.v) + m.eps) * c(m.w) + c(m.b), "w b mu v"),
    "power": (lambda m, x: (x - c(m.mu)) * c((m.v + m.eps).pow(-0.5)) * c(m.w) + c(m.b), "w b mu v"),
    "one over": (
        lambda m, x: (x - c(m.mu)) * (1.0 / torch.sqrt(c(m.v) + m.eps)) * c(m.w) + c(m.b),
        "w b mu v",
    ),
    "reciprocal": (lambda m, x: (x - c(m.mu)) * c(m.v.sqrt().reciprocal() * m.w) + c(m.b), "w b mu v"),
    "a deviation": (lambda m, x: (x - c(m.mu)) / c(m.std) * c(m.w) + c(m.b), "w b mu std"),
    "scale and shift": (lambda m, x: x * c(m.scale) + c(m.shift), "scale shift"),
    "scale and shift, in one": (lambda m, x: torch.addcmul(c(m.shift), x, c(m.scale)), "scale shift"),
    "no beta": (lambda m, x: (x - c(m.mu)) / (c(m.v) + m.eps).sqrt() * c(m.w), "w mu v"),
    "neither": (lambda m, x: (x - c(m.mu)) / (c(m.v) + m.eps).sqrt(), "mu v"),
    "view": (
        lambda m, x: (
            (x - m.mu.view(1, -1, 1, 1)) * (m.w / (m.v + m.eps).sqrt()).view(1, -1, 1, 1)
            + m.b.view(1, -1, 1, 1)
        ),
        "w b mu v",
    ),
    "unsqueeze": (
        lambda m, x: (
            (x - m.mu[:, None, None]) * (m.w / (m.v + m.eps).sqrt()).unsqueeze(-1).unsqueeze(-1)
            + m.b[:, None, None]
        ),
        "w b mu v",
    ),
    "expand": (
        lambda m, x: (x - c(m.mu).expand_as(x[:1])) / (c(m.v) + m.eps).sqrt() * c(m.w) + c(m.b),
        "w b mu v",
    ),
    "minus the other way": (lambda m, x: c(m.b) - (c(m.mu) - x) * c(m.w / (m.v + m.eps) ** 0.5), "w b mu v"),
    "in place": (in_place, "g b mu var"),
    "channels last": (channels_last, "g b mu var"),
    "flattened and back": (flat, "g b mu var"),
    "by function": (lambda m, x: F.batch_norm(x, m.mu, m.v, m.w, m.b, False, 0.1, m.eps), "w b mu v"),
    "by torch.batch_norm": (
        lambda m, x: torch.batch_norm(x, m.w, m.b, m.mu, m.v, False, 0.0, m.eps, False),
        "w b mu v",
    ),
    "by native_batch_norm": (
        lambda m, x: torch.native_batch_norm(x, m.w, m.b, m.mu, m.v, False, 0.0, m.eps)[0],
        "w b mu v",
    ),
    "gamma plus one": (lambda m, x: F.batch_norm(x, m.mu, m.v, m.w + 1, m.b, False, 0.1, m.eps), "w b mu v"),
    "negated mean": (lambda m, x: (x + c(-m.mu)) * c((m.v + m.eps).rsqrt()) * c(m.w) + c(m.b), "w b mu v"),
    "log of the variance": (
        lambda m, x: (x - c(m.mu)) * c((-0.5 * m.logv).exp()) * c(m.w) + c(m.b),
        "w b mu logv",
    ),
    "variance kept from zero": (
        lambda m, x: (x - c(m.mu)) / c(m.v.clamp(min=1e-5)).sqrt() * c(m.w) + c(m.b),
        "w b mu v",
    ),
}


@pytest.mark.parametrize("style", sorted(VARIANTS))
def test_each_folds_exactly_and_its_plan_fits_other_weights(style: str) -> None:
    torch.manual_seed(0)
    model, other = (
        nn.Sequential(nn.Conv2d(3, C, 3, bias=False), Own(*VARIANTS[style]), nn.ReLU()).double().eval()
        for _ in range(2)
    )
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    result = bntool.fold(model, x)
    assert [site.bn for site in result.plan.fold_sites] == ["1"]
    assert isinstance(result.model[1], nn.Identity)
    # 27 products and their sum, then at most twelve roundings of a BatchNorm in another order
    limit = 64 * torch.finfo(torch.float64).eps
    assert (result.model(x) - model(x)).abs().max() < limit * model(x).abs().max().clamp(min=1)
    if style in ("log of the variance", "variance kept from zero"):
        return  # what no step of a map computes is kept as numbers
    plan = Plan.from_json(plan_module_fold(model, observe(model, Inputs((x,)))).plan.to_json())
    assert (replay_fold(other, plan)(x) - other(x)).abs().max() < limit * other(x).abs().max().clamp(min=1)


def test_tensors_of_any_shape() -> None:
    for shape in ((1, C, 1, 1), (C, 1, 1)):
        own = Own(lambda m, x: (x - m.mu) / (m.v + m.eps).sqrt() * m.w + m.b, "w b mu v", shape)
        model = nn.Sequential(nn.Conv2d(3, C, 3), own).double().eval()
        assert len(bntool.plan_fold(model, torch.randn(1, 3, 7, 7).double()).sites) == 1


def test_the_one_of_a_bank_folds_where_it_alone_is_called() -> None:
    def of(domain: int) -> Callable[[Any, Tensor], Tensor]:
        return lambda m, x: F.batch_norm(
            x, m.mu[domain], m.v[domain], m.w[domain], m.b[domain], False, 0.0, m.eps
        )

    model = nn.Sequential(nn.Conv2d(3, C, 3), Own(of(2), "w b mu v", (C, C))).double().eval()
    x = torch.randn(1, 3, 7, 7).double()
    result = bntool.fold(model, x)
    assert len(result.sites) == 1 and torch.allclose(result.model(x), model(x), rtol=0, atol=1e-12)


class Told(nn.Module):
    """Hands its BatchNorm more than the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3), Own(VARIANTS["rsqrt"][0], "w b mu v")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), None, 3)


def test_one_that_is_handed_more_than_the_data_still_is_when_it_has_gone() -> None:
    model, x = Told().double().eval(), torch.randn(1, 3, 7, 7).double()
    result = bntool.fold(model, x)
    assert len(result.sites) == 1 and torch.allclose(result.model(x), model(x), rtol=0, atol=1e-12)


def test_what_is_not_a_layer_of_its_own_gets_a_verdict() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, C, 3), nn.Conv2d(C, 2, 1)
            for name in ("w", "b", "mu", "v"):
                self.register_buffer(name, torch.rand(C) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = (self.conv(x) - c(self.mu)) / (c(self.v) + 1e-5).sqrt() * c(self.w) + c(self.b)
            return self.after(x.relu())

    plan = bntool.plan_fold(Inline().eval(), torch.randn(1, 3, 7, 7))
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("batch_norm", Reason.FUNCTIONAL)]
    more = Own(lambda m, x: VARIANTS["rsqrt"][0](m, x).relu(), "w b mu v")
    plan = bntool.plan_fold(
        nn.Sequential(nn.Conv2d(3, C, 3), more).double().eval(), torch.randn(1, 3, 7, 7).double()
    )
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("1", Reason.CUSTOM_FORWARD)]


def test_one_that_stays_takes_no_other_in() -> None:
    own = Own(VARIANTS["rsqrt"][0], "w b mu v")
    model = nn.Sequential(nn.Softmax(1), own, nn.BatchNorm2d(C), nn.Tanh()).double().eval()
    nn.init.normal_(model[2].bias)
    plan = bntool.plan_fold(model, torch.randn(1, C, 5, 5).double(), exclude=("1",))
    assert {skip.name: skip.reason for skip in plan.skips} == {"1": Reason.EXCLUDED, "2": Reason.EXCLUDED}


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, C), nn.LayerNorm([7, 7]), nn.InstanceNorm2d(C, affine=True)]
)
def test_other_normalisations_and_their_affine_are_none(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), layer, nn.ReLU()).eval()
    plan = bntool.plan_fold(model, torch.randn(1, 3, 7, 7))
    assert not plan.sites and not plan.skips


def test_a_module_that_only_holds_a_batchnorm_is_none_itself() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(nn.Linear(3, C), nn.Sequential(Turned()), nn.Tanh()).eval()
    plan = bntool.plan_fold(model, torch.randn(2, 5, 3))
    assert [site.bn for site in plan.fold_sites] == ["1.0.norm"] and not plan.skips
