"""Sums on the way of a map: the other branch gives way, and what reads it takes the inverse in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from tests.folding.test_inverse import conditioned
from tests.laws.exactness import Numbers, data, few, folded_exactly, numbers, verdict

FILL = Numbers("mixed", True, 1e-3, 1.0, 4)


class Mixer(nn.Module):
    """Behind an activation: norm(gelu(first(y))) + y, where y is a layer's output, then a layer."""

    def __init__(self, norm: nn.Module, padding: int = 1, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1) if stem is None else stem
        self.first = nn.Conv2d(4, 4, 3, padding=padding, groups=4)
        self.norm, self.last = norm, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.last(self.norm(nn.functional.gelu(self.first(y))) + y)


@few
@given(numbers)
def test_the_other_branch_of_a_sum_gives_way(fill: Numbers) -> None:
    """Its zero-padded reader takes the inverse scale in, the last layer scale and shift."""
    fill = conditioned(fill)
    found = verdict(Mixer(fill.fill(nn.BatchNorm2d(4))), data(2, 3, 5, 5, seed=fill.seed))
    assert found is (Reason.NONLINEAR if fill.gamma == "zero" else None)


def test_a_batch_norm_that_stays_gives_way_too() -> None:
    """The stem's own cannot go: its shift meets the padding, and its scale an activation."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), FILL.fill(nn.BatchNorm2d(4)))
    plan, _ = folded_exactly(Mixer(FILL.fill(nn.BatchNorm2d(4)), stem=stem), data(2, 3, 5, 5))
    assert [site.bn for site in plan.sites] == ["norm"]
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("stem.2", Reason.NONLINEAR)]
    assert any("condition number" in note for note in plan.notes)


@pytest.mark.parametrize("stem", [nn.Softplus(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())])
def test_a_branch_that_cannot_give_way_keeps_the_batch_norm(stem: nn.Module) -> None:
    shape = (2, 3 if isinstance(stem, nn.Sequential) else 4, 5, 5)
    model = Mixer(FILL.fill(nn.BatchNorm2d(4)), stem=stem)
    assert verdict(model, data(*shape)) is Reason.NONLINEAR


@pytest.mark.parametrize(("least", "folds"), [(1e-1, True), (1e-5, False)])
def test_a_scale_near_zero_is_not_asked_of_others(least: float, folds: bool) -> None:
    norm = nn.BatchNorm2d(4)
    norm.weight.data[2] = least
    model = Mixer(norm).eval()
    plan = plan_fold(observe(model, Inputs((torch.randn(2, 3, 5, 5),))).graph)
    assert bool(plan.sites) is folds


class Gated(nn.Module):
    """Visual attention: y + scale·(second(first(n)·gate(n)) + n), where n = norm(y) is read three times."""

    def __init__(self, norm: nn.Module, shared: bool = False, axes: tuple[int, ...] = (4, 1, 1)) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), norm
        self.first, self.gate, self.second = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.0, 4).reshape(axes))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        n = self.norm(y)
        inner = self.second(self.first(n) * torch.sigmoid(self.gate(n)))
        scale = self.scale if self.scale.dim() == 3 else self.scale.unsqueeze(-1).unsqueeze(-1)
        out = y + scale * (inner + n)
        return torch.softmax(out + scale if self.shared else out, 1)


@few
@given(numbers, st.sampled_from([(4, 1, 1), (4,)]))
def test_a_stored_factor_takes_the_scale_in(fill: Numbers, axes: tuple[int, ...]) -> None:
    """scale·(inner + s·y + t) = (scale·s)·((inner + t)/s + y), so nothing is left for the skip."""
    fill = conditioned(fill)
    found = verdict(Gated(fill.fill(nn.BatchNorm2d(4)), axes=axes), data(2, 3, 5, 5, seed=fill.seed))
    assert found is (Reason.OUTPUT_USED_ELSEWHERE if fill.gamma == "zero" else None)


@pytest.mark.parametrize("axes", [(4, 1, 1), (4,)])
def test_a_factor_that_others_read_stays(axes: tuple[int, ...]) -> None:
    model = Gated(FILL.fill(nn.BatchNorm2d(4)), shared=True, axes=axes)
    assert verdict(model, data(2, 3, 5, 5)) is Reason.OUTPUT_USED_ELSEWHERE


class Factor(nn.Module):
    """Of what no layer gives: norm(scale·gelu(x)), with a factor of its own."""

    def __init__(self, norm: nn.Module, factor: float = 2.0) -> None:
        super().__init__()
        self.norm, self.scale = norm, nn.Parameter(torch.full((4, 1, 1), factor))
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.scale * nn.functional.gelu(x) + self.bias))


@few
@given(numbers)
def test_a_stored_factor_and_a_summand_are_a_layer(fill: Numbers) -> None:
    found = verdict(Factor(conditioned(fill).fill(nn.BatchNorm2d(4))), data(2, 4, 5, 5, seed=fill.seed))
    assert found is (Reason.NONLINEAR if fill.gamma == "zero" else None)


class Activated(nn.Module):
    """Two units that begin with their norm: y + second(relu(first(relu(norm(y))))), or without the ReLU."""

    def __init__(self, norms: list[nn.Module], act: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.stem, self.norms, self.act, self.pool = nn.Conv2d(3, 4, 1), nn.ModuleList(norms), act, pool
        self.firsts, self.seconds = (
            nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in norms) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for norm, first, second in zip(self.norms, self.firsts, self.seconds, strict=True):
            y = self.pool(y) + self.pool(second(torch.relu(first(self.act(norm(y))))))
        return torch.softmax(self.head(y.mean((2, 3))), 1)


@pytest.mark.parametrize("second", ["positive", "mixed"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity()])
@pytest.mark.parametrize("pool", [nn.Identity(), nn.MaxPool2d(1, 1)])
def test_a_shift_goes_on_along_the_shortcut(second: str, act: nn.Module, pool: nn.Module) -> None:
    """The scale goes down into the zero-padded layer, past a ReLU only where γ > 0. The shift goes up, and
    the other branch of the sum takes it back. One norm may also turn the sign of all that a sum is made of.
    """
    fills = [Numbers(gamma, True, 1e-3, 1.0, seed) for seed, gamma in enumerate(("mixed", second, "mixed"))]
    model = Activated([fill.fill(nn.BatchNorm2d(4)) for fill in fills], act, pool)
    plan, _ = folded_exactly(model, data(2, 3, 5, 5))
    blocked = second == "positive" and isinstance(act, nn.ReLU)
    assert [skip.name for skip in plan.skips] == (["norms.1"] if blocked else [])


def test_a_write_over_the_shortcut_is_told_where_it_alone_keeps_a_batch_norm() -> None:
    norms = [Numbers("positive", True, 1e-3, 1.0, seed).fill(nn.BatchNorm2d(4)) for seed in range(2)]
    plan, _ = folded_exactly(Activated(norms, nn.ReLU(inplace=True), nn.Identity()), data(2, 3, 5, 5))
    assert [skip.reason for skip in plan.skips] == [Reason.OUTPUT_USED_ELSEWHERE] * 2
    assert all("would write in place what others read" in skip.detail for skip in plan.skips)
