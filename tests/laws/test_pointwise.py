"""Sums, products and activations between a linear layer and a BatchNorm, both ways round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.laws.exactness import Chain, Numbers, data, few, folded_exactly, numbers, verdict

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "steep": lambda x: F.leaky_relu(x, 3.0),
    "clamp": lambda x: x.clamp(min=0),
    "prelu": lambda x: F.prelu(x, torch.linspace(-1, 2, x.shape[1], dtype=x.dtype)),  # no stored slope
}


def both_ways(step: Any, fill: Numbers) -> tuple[Reason | None, Reason | None]:
    """The verdicts of conv -> step -> BN, and of BN -> step -> conv without padding."""
    x = data(2, 4, 5, 3, seed=fill.seed)
    up = verdict(Chain(nn.Conv2d(4, 4, 1), step, fill.fill(nn.BatchNorm2d(4))), x)
    return up, verdict(Chain(fill.fill(nn.BatchNorm2d(4)), step, nn.Conv2d(4, 3, 2)), x)


@few
@given(numbers, st.sampled_from(sorted(ACTIVATIONS)))
def test_positively_homogeneous(fill: Numbers, name: str) -> None:
    up, down = both_ways(ACTIVATIONS[name], fill)
    if fill.shift:
        assert up is Reason.NONLINEAR
    else:
        assert up is (Reason.NEGATIVE_SCALE if fill.has_negative else None)
    assert (down is None) == (not fill.shift and not fill.has_negative)


@few
@given(numbers, st.sampled_from(["relu6", "sigmoid", "tanh", "hardswish", "gelu", "elu", "softplus"]))
def test_no_other_activation_lets_anything_by(fill: Numbers, name: str) -> None:
    up, down = both_ways(getattr(F, name), fill)
    assert up is Reason.NONLINEAR
    assert down is Reason.REACHES_INPUT


CONSTANTS = [(), (1,), (4, 1, 1), (1, 4, 1, 1)]


@few
@given(
    numbers, st.sampled_from(CONSTANTS), st.integers(0, 99), st.sampled_from(["left", "right", "in place"])
)
def test_constant_added(fill: Numbers, shape: tuple[int, ...], seed: int, how: str) -> None:
    c = data(*shape, seed=seed)
    step = {
        "left": lambda x: c + x,
        "right": lambda x: torch.add(x, c, alpha=0.3),
        "in place": lambda x: x.add_(c),
    }[how]
    up, down = both_ways(step, fill)
    assert up is None
    assert (down is None) == (how != "in place")  # without the BN the model's own input would be written to


@few
@given(numbers, st.sampled_from(CONSTANTS), st.integers(0, 99), st.booleans())
def test_constant_subtracted(fill: Numbers, shape: tuple[int, ...], seed: int, scaled: bool) -> None:
    c = data(*shape, seed=seed)
    up, down = both_ways(lambda x: torch.sub(x, c, alpha=2.5 if scaled else 1), fill)
    assert up is None
    assert down is None


@few
@given(numbers, st.sampled_from(CONSTANTS), st.integers(0, 99), st.sampled_from(["sub", "weighed", "number"]))
def test_subtracted_from_a_constant(fill: Numbers, shape: tuple[int, ...], seed: int, how: str) -> None:
    c = data(*shape, seed=seed)
    step = {
        "sub": lambda x: torch.sub(c, x, alpha=2.5),
        "weighed": lambda x: torch.add(c, x, alpha=-0.7),
        "number": lambda x: 1.5 - x,
    }[how]
    up, down = both_ways(step, fill)
    assert up is None
    assert down is None


def test_a_shift_alone_passes_a_constant_that_is_too_large_to_be_read() -> None:
    """With a scale of one, x + c + t = (x + t) + c, whatever c is."""
    norm = Numbers("positive", True, 0.0, 1.0, 0).fill(nn.BatchNorm2d(4))
    nn.init.ones_(norm.weight)
    nn.init.ones_(norm.running_var)
    large = data(1, 4, 160, 160)
    assert large.numel() > 1 << 16
    model = Chain(nn.Conv2d(4, 4, 1), lambda x: x + large, norm)
    assert verdict(model, data(1, 4, 160, 160)) is None
    nn.init.constant_(norm.weight, 2.0)
    assert verdict(model, data(1, 4, 160, 160)) is Reason.UNKNOWN_OP


def test_slopes_that_depend_on_the_data_let_nothing_by() -> None:
    slopes = lambda x: F.prelu(x, x.mean((0, 2, 3)))  # noqa: E731
    fill = Numbers("positive", False, 1e-5, 1.0, 0)
    model = Chain(nn.Conv2d(4, 4, 1), slopes, fill.fill(nn.BatchNorm2d(4)))
    assert verdict(model, data(2, 4, 5, 3)) is Reason.UNKNOWN_OP


@few
@given(numbers)
def test_a_weight_of_zero_swallows_a_shift(fill: Numbers) -> None:
    step = lambda x: torch.add(torch.ones(()), x, alpha=0.0)  # noqa: E731
    model = Chain(nn.Conv2d(4, 4, 1), step, fill.fill(nn.BatchNorm2d(4)))
    assert verdict(model, data(2, 4, 5, 3)) is Reason.ZERO_SCALE


@few
@given(
    numbers,
    st.sampled_from(CONSTANTS),
    st.integers(0, 99),
    st.sampled_from(["mul", "div", "in place", "neg"]),
)
def test_constant_factor(fill: Numbers, shape: tuple[int, ...], seed: int, how: str) -> None:
    c = data(*shape, seed=seed) + 3.0
    step = {
        "mul": lambda x: c * x,
        "div": lambda x: x / c,
        "in place": lambda x: x * 1.0,
        "neg": lambda x: -x,
    }[how]
    up, down = both_ways(step, fill)
    assert up is None
    assert down is None


@few
@given(numbers, st.integers(0, 99))
def test_constant_over_space_is_exact_or_kept(fill: Numbers, seed: int) -> None:
    mask = data(1, 1, 5, 3, seed=seed)
    up, down = both_ways(lambda x: x * mask, fill)
    assert (up is None) == (down is None) == (not fill.shift)
    both_ways(lambda x: x + mask, fill)


@few
@given(numbers)
def test_factor_of_zero_swallows_a_shift(fill: Numbers) -> None:
    c = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).view(4, 1, 1)
    up, down = both_ways(lambda x: x * c, fill)
    assert up is (Reason.ZERO_SCALE if fill.shift else None)
    assert down is None


@few
@given(numbers)
def test_broadcast_operand_lets_nothing_by(fill: Numbers) -> None:
    wide = data(2, 4, 5, 3)
    model = Chain(fill.fill(nn.BatchNorm2d(4)), lambda x: x + wide, nn.Conv2d(4, 3, 1))
    assert verdict(model, data(2, 4, 1, 1)) is Reason.REACHES_INPUT


class Summed(nn.Module):
    """Two convolutions joined by `join`, then a BatchNorm, then one more layer."""

    def __init__(self, join: Any, fill: Numbers, second: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1) if second else nn.Identity()
        self.join, self.norm = join, fill.fill(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.join(self.a(x), self.b(x)))


@few
@given(numbers)
def test_sum_of_branches(fill: Numbers) -> None:
    x = data(2, 4, 5, 3)
    assert verdict(Summed(torch.add, fill), x) is None
    assert verdict(Summed(torch.add, fill, second=False), x) is Reason.REACHES_INPUT
    assert verdict(Summed(lambda a, b: a - b, fill), x) is None
    assert verdict(Summed(lambda a, b: torch.add(a, b, alpha=0.5), fill), x) is None
    assert verdict(Summed(lambda a, b: torch.sub(b, a, alpha=-2.0), fill), x) is None
    assert verdict(Summed(torch.mul, fill), x) is (Reason.NONLINEAR if fill.shift else None)


@few
@given(numbers)
def test_shift_finds_the_branch_that_can_take_it(fill: Numbers) -> None:
    """Behind a ReLU only the scale passes; the other branch takes the shift."""
    first = verdict(Summed(lambda a, b: a.relu() + b, fill), data(2, 4, 5, 3))
    second = verdict(Summed(lambda a, b: a + b.relu(), fill), data(2, 4, 5, 3))
    kept = (Reason.NEGATIVE_SCALE, Reason.NONLINEAR) if fill.has_negative else (None,)
    assert first in kept
    assert second in kept


@few
@given(numbers, st.sampled_from([1.0, -1.0, 0.25]))
def test_shift_finds_the_branch_it_reaches_through_a_weight(fill: Numbers, alpha: float) -> None:
    """The first branch ends in a ReLU, so the shift goes to the second, divided by that branch's weight."""
    found = verdict(Summed(lambda a, b: torch.sub(a.relu(), b, alpha=alpha), fill), data(2, 4, 5, 3))
    assert found in ((Reason.NEGATIVE_SCALE, Reason.NONLINEAR) if fill.has_negative else (None,))


@few
@given(numbers, st.sampled_from([1.0, 0.5, -3.0]))
def test_weighed_branches_downstream(fill: Numbers, alpha: float) -> None:
    """BN(x) − α·BN(x) carries (1 − α)·t."""
    twice = Chain(fill.fill(nn.BatchNorm2d(4)), lambda y: torch.sub(y, y, alpha=alpha), nn.Conv2d(4, 3, 2))
    assert verdict(twice, data(2, 4, 5, 3)) is None


@few
@given(numbers)
def test_residual_of_a_norm_downstream(fill: Numbers) -> None:
    """BN(x) + BN(x) carries 2·t; BN(x) + x carries two scales and is kept."""
    twice = Chain(fill.fill(nn.BatchNorm2d(4)), lambda y: y + y, nn.Conv2d(4, 3, 2))
    assert verdict(twice, data(2, 4, 5, 3)) is None


@few
@given(numbers, st.integers(2, 4))
def test_sum_of_many_normed_branches(fill: Numbers, count: int) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(count))
            self.inner = nn.ModuleList(fill.fill(nn.BatchNorm2d(4)) for _ in range(count))
            self.outer = fill.fill(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(sum(n(c(x)) for n, c in zip(self.inner, self.convs, strict=True)))

    plan, _ = folded_exactly(Blocks(), data(2, 4, 5, 3))
    assert not plan.skips
