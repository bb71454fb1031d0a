"""Sums, products and activations between a linear layer and a BatchNorm, both ways round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.laws.base import LAWS, Refused
from tests.laws.by_hand import Seen, affine
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
@given(
    numbers,
    st.sampled_from(CONSTANTS),
    st.integers(0, 99),
    st.sampled_from(["sub", "weighed", "twice", "number"]),
)
def test_subtracted_from_a_constant(fill: Numbers, shape: tuple[int, ...], seed: int, how: str) -> None:
    c = data(*shape, seed=seed)
    step = {
        "sub": lambda x: torch.sub(c, x, alpha=2.5),
        "weighed": lambda x: torch.add(c, x, alpha=-0.7),
        "twice": lambda x: torch.add(c, x, alpha=2.0),
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


# -- asked by hand -------------------------------------------------------------------------------------

DEMAND = affine([2.0, 3.0, 4.0], [1.0, 0.0, -1.0])
SCALE = affine([2.0, 3.0, 4.0])
SPREAD = (2, 3, 1)


def up(seen: Seen, demand: Affine) -> dict[str, Affine]:
    return LAWS[seen.op.kind][0](seen, seen.op, [demand])


def down(seen: Seen, **maps: Affine) -> Affine:
    (found,) = LAWS[seen.op.kind][1](seen, seen.op, maps)
    return found


@pytest.mark.parametrize("stored", ["input", "other"])
def test_a_stored_summand_takes_the_shift(stored: str) -> None:
    data_role = "other" if stored == "input" else "input"
    for numbers_ in (torch.ones(3, 1), torch.ones(1, 3, 1), torch.ones(3, 4), torch.ones(2, 3, 4)):
        given = (
            {"input": numbers_, "other": None} if stored == "input" else {"input": None, "other": numbers_}
        )
        seen = Seen({"alpha": 1.0}, kind="add", **given)
        seen.store(stored)
        (asked,) = up(seen, DEMAND).items()
        assert asked[0] == data_role
        assert (torch.equal(asked[1].scale, DEMAND.scale), asked[1].has_shift) == (True, False)
        assert seen.taken == {stored: DEMAND}


@pytest.mark.parametrize(
    "why", ["coarse", "whole numbers", "read twice", "another name", "computed", "two branches"]
)
def test_a_summand_that_cannot_take_the_shift_leaves_it_to_the_branch(why: str) -> None:
    numbers_ = {"coarse": torch.ones(1, 4), "whole numbers": torch.ones(3, 1, dtype=torch.int64)}
    given = None if why == "two branches" else numbers_.get(why, torch.ones(3, 1))
    seen = Seen({"alpha": 1.0}, kind="add", picks=0, input=None, other=given)
    if given is not None and why != "computed":
        seen.store("other")
    if why == "read twice":
        seen.graph.add_op("neg", {"input": seen.op.inputs["other"]}, (), attrs={})
    if why == "another name":
        seen.graph.aliases["other"] = ["also"]
    assert up(seen, DEMAND)["input"].has_shift
    assert not seen.taken


@pytest.mark.parametrize("picks", [0, 1])
def test_the_shift_goes_to_one_branch_and_the_scale_to_all(picks: int) -> None:
    found = up(Seen({"alpha": 1.0}, kind="add", picks=picks, input=None, other=None), DEMAND)
    assert [found[role].has_shift for role in ("input", "other")] == [picks == 0, picks == 1]
    assert all(torch.equal(each.scale, DEMAND.scale) for each in found.values())


@pytest.mark.parametrize("kind", ["add", "mul", "div"])
def test_an_operand_that_is_spread_stands_for_several_elements(kind: str) -> None:
    """It can become no map of its own, and a map of it is none of the result's elements."""
    both = Seen({"alpha": 1.0}, kind=kind, input=SPREAD, other=SPREAD)
    with pytest.raises(Refused, match="broadcast"):
        up(both, SCALE)
    with pytest.raises(Refused, match="broadcast"):
        down(both, input=SCALE)


def test_one_factor_takes_the_scale_and_it_must_not_be_spread() -> None:
    for picks, role in enumerate(("input", "other")):
        assert up(Seen(picks=picks, input=None, other=None), SCALE) == {role: SCALE}
        given = {"input": SPREAD, "other": None} if role == "other" else {"input": None, "other": SPREAD}
        assert up(Seen(**given), SCALE) == {role: SCALE}
    assert up(Seen(kind="div", input=None, other=None), SCALE) == {"input": SCALE}


def test_one_factor_alone_may_have_become_a_multiple() -> None:
    assert down(Seen(input=None, other=None), other=SCALE) is SCALE
    assert down(Seen(kind="div", input=None, other=None), input=SCALE) is SCALE
    for kind, maps in (("mul", {"input": SCALE, "other": SCALE}), ("div", {"other": SCALE})):
        with pytest.raises(Refused, match="multiplies or divides by what changes"):
            down(Seen(kind=kind, input=None, other=None), **maps)
    with pytest.raises(Refused, match="two values that depend on the data"):
        down(Seen(input=None, other=None), input=DEMAND)
