"""A plan on a fresh model: its own architecture takes it, any other refuses it and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bntool
from bntool.core.errors import PlanError
from bntool.core.plan import Plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))


class ReadTwice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return F.relu(self.two(F.relu(y))) + y


class OfOneClass(Functional):
    """Takes no layer of another class than it was written for."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.one(x))))
        return y if type(self.two) is nn.Conv2d else y + 1


def two_convs(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), act(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(
    ("build", "other", "difference"),
    [
        (two_convs, lambda: two_convs(nn.Sigmoid), "'0' is no place for a BatchNorm: sigmoid follows"),
        (Functional, ReadTwice, "'one' is no place for a BatchNorm: its output is read by relu, add"),
    ],
)
def test_a_model_of_the_same_tensors_that_computes_something_else_is_refused(
    build: Any, other: Any, difference: str
) -> None:
    plan = bntool.insert(build(), X).plan
    with pytest.raises(PlanError, match=f"made for another model .*{difference}"):
        bntool.apply(other(), plan, X)


@pytest.mark.parametrize(
    "options", [{}, {"keep_keys": True}, {"drop_bias": True}, {"every": 2}, {"init": "default"}]
)
@pytest.mark.parametrize("build", [two_convs, Functional, OfOneClass])
def test_a_fresh_model_of_the_same_class_gets_the_same_layers(build: Any, options: dict[str, Any]) -> None:
    result = bntool.insert(build(), X, **options)
    again = bntool.apply(build(), Plan.from_json(result.plan.to_json()), X)
    assert list(again.model.state_dict()) == list(result.model.state_dict())
    assert repr(again.model) == repr(result.model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv": "9"}, "it has no layer '9'"),
        ({"channels": 99}, "channels of '0' is 4, the plan expects 99"),
        ({"dims": 1}, "dims of '0' is 2, the plan expects 1"),
        ({"form": "no-such-form"}, r"damaged: invalid enum value 'no-such-form'\n  where: sites\[0\]\.form"),
        ({"slot": "0"}, "slot of '0' is '', the plan expects '0'"),
        ({"calls": 2}, "calls of '0' is 1, the plan expects 2"),
        ({"calls": "2"}, r"damaged: expected `int`, got `str`\n  where: sites\[0\]\.calls"),
        ({"colour": "red"}, r"damaged: there is no 'colour' here\n  where: sites\[0\]"),
        ({"bn": "77"}, "this plan is damaged: the plan put a BatchNorm at 77"),
    ],
)
def test_a_site_that_says_something_else_is_named(change: dict[str, Any], words: str) -> None:
    data = bntool.insert(two_convs(), X).plan.to_dict()
    data["sites"][0] |= change
    with pytest.raises(PlanError, match=words):
        bntool.apply(two_convs(), Plan.from_dict(data), X)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": "small"}, "damaged"),
        ({"init": "zeros"}, r"damaged: invalid enum value 'zeros'\n  where: options\.init"),
        ({"eps": 2.0}, r"damaged: eps must lie between 0 and 1, not 2\.0\n  where: options"),
        ({"colour": "red"}, "damaged: .*colour"),
    ],
)
def test_an_option_that_there_is_not_is_a_damaged_plan(change: dict[str, Any], words: str) -> None:
    data = bntool.insert(two_convs(), X).plan.to_dict()
    data["options"] = {**data["options"], **change}
    with pytest.raises(PlanError, match=words):
        bntool.apply(two_convs(), Plan.from_dict(data), X)


def test_a_bias_that_cannot_move_is_named() -> None:
    data = bntool.insert(two_convs(), X, drop_bias=True).plan.to_dict()
    data["dropped_biases"][0] |= {"conv": "4", "bias": "4.bias"}
    with pytest.raises(PlanError, match=r"'4\.bias' cannot move into a BatchNorm"):
        bntool.apply(two_convs(), Plan.from_dict(data), X)
