"""Spreads: a scale passes them by its size, and a standard deviation forgets the shift."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.laws.exactness import Chain, Numbers, data, few, numbers, verdict

Measure = Callable[[Tensor], Tensor]

FORGETFUL: dict[str, Measure] = {
    "std": lambda x: x.std(-1),
    "var, kept": lambda x: x.var(-1, keepdim=True).squeeze(-1),
    "both": lambda x: torch.cat([x.mean(-1), x.std(-1, correction=0)], 1),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, -1), 1),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, -1), 1),
}
FROM_ZERO: dict[str, Measure] = {
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norm of order 1": lambda x: torch.norm(x, p=1, dim=-1),
    "largest": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1),
}


def behind(measure: Measure, fill: Numbers) -> nn.Module:
    """BatchNorm -> measure over the last axis -> linear; nothing before it takes anything in."""
    width = measure(torch.ones(1, 4, 3)).shape[1]
    first = nn.Sequential(nn.Softmax(1), fill.fill(nn.BatchNorm1d(4)))
    return Chain(first, measure, nn.Linear(width, 3))


@few
@given(numbers, st.sampled_from(sorted(FORGETFUL)))
def test_a_spread_carries_the_size_of_a_scale_downstream(fill: Numbers, name: str) -> None:
    assert verdict(behind(FORGETFUL[name], fill), data(2, 4, 5, seed=fill.seed)) is None


@few
@given(numbers, st.sampled_from(sorted(FROM_ZERO)))
def test_a_norm_carries_it_where_there_is_no_shift(fill: Numbers, name: str) -> None:
    found = verdict(behind(FROM_ZERO[name], fill), data(2, 4, 5, seed=fill.seed))
    assert found is (Reason.NONLINEAR if fill.shift else None)


@few
@given(numbers, st.sampled_from(["std", "var, kept"]))
def test_upstream_a_spread_meets_a_scale_that_is_not_negative(fill: Numbers, name: str) -> None:
    fill = Numbers(fill.gamma, False, fill.eps, fill.variance, fill.seed)
    model = Chain(nn.Conv1d(3, 4, 1), FORGETFUL[name], nn.Sequential(fill.fill(nn.BatchNorm1d(4)), nn.Tanh()))
    found = verdict(model, data(2, 3, 5, seed=fill.seed))
    assert found is (Reason.NEGATIVE_SCALE if fill.has_negative else None)


def test_across_channels_no_spread_lets_by_what_differs_from_channel_to_channel() -> None:
    fill = Numbers("positive", False, 1e-5, 1.0, 3)
    model = Chain(
        nn.Sequential(nn.Softmax(1), fill.fill(nn.BatchNorm1d(4))), lambda x: x.std(1), nn.Linear(5, 2)
    )
    assert verdict(model, data(2, 4, 5)) is not None


@pytest.mark.parametrize("order", [0, 0.0])
def test_a_count_of_what_is_not_zero_is_no_norm(order: float) -> None:
    def count(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, order, dim=-1)

    fill = Numbers("positive", False, 1e-5, 1.0, 3)
    assert verdict(behind(count, fill), data(2, 4, 5)) is Reason.NONLINEAR
