"""Other readers of what a BatchNorm moves past: they take the inverse map in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from tests.laws.exactness import Numbers, data, few, folded_exactly, numbers, verdict


class Block(nn.Module):
    """Post-norm: y = first(x), then norm(y + second(gelu(third(y)))); `seen` reads y in a way of its own."""

    def __init__(self, norm: nn.Module, seen: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(6, 4), nn.Linear(4, 6, bias=False)
        self.norm, self.seen = norm, seen

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        inner = self.second(nn.functional.gelu(self.third(y)))
        out = torch.softmax(self.norm(y + inner), 1)
        return out if self.seen is None else out + self.seen(y).sum()


def conditioned(fill: Numbers) -> Numbers:
    """Of numbers whose inverse is well conditioned even with float64's epsilon in the bound."""
    return Numbers(fill.gamma, fill.shift, 1e-3, 1.0, fill.seed)


@few
@given(numbers)
def test_linear_readers_take_the_inverse_in(fill: Numbers) -> None:
    fill = conditioned(fill)
    found = verdict(Block(fill.fill(nn.BatchNorm1d(4))), data(5, 3, seed=fill.seed))
    assert found is (Reason.OUTPUT_USED_ELSEWHERE if fill.gamma == "zero" else None)


def test_the_condition_is_told() -> None:
    fill = Numbers("mixed", True, 1e-3, 1.0, 4)
    plan, _ = folded_exactly(Block(fill.fill(nn.BatchNorm1d(4))), data(5, 3))
    (site,) = plan.fold_sites
    assert "inverse" in site.laws
    assert any("condition number" in note for note in plan.notes)


def test_a_reader_that_is_not_linear_keeps_the_batch_norm() -> None:
    fill = Numbers("mixed", True, 1e-3, 1.0, 4)
    model = Block(fill.fill(nn.BatchNorm1d(4)), nn.Tanh())
    assert verdict(model, data(5, 3)) is Reason.OUTPUT_USED_ELSEWHERE


@pytest.mark.parametrize(("least", "folds"), [(1e-1, True), (1e-5, False)])
def test_a_scale_near_zero_has_no_inverse_worth_having(least: float, folds: bool) -> None:
    """In float32 the bound is 1/√ε, some 2,900: undoing 1e-5 would cost five of seven digits."""
    norm = nn.BatchNorm1d(4)
    norm.weight.data[2] = least
    model = Block(norm).eval()
    plan = plan_fold(observe(model, Inputs((torch.randn(5, 3),))).graph)
    assert bool(plan.sites) is folds
