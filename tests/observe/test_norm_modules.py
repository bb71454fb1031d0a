"""A frozen BatchNorm written out in the forward of a user's own class: recognised by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bntool
from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.subjects.module_folding import plan_module_fold
from bntool.surgery.replaying import replay_fold
from tests.laws.exactness import Chain, data, few, folded_exactly, verdict

NAMES = ("weight", "bias", "running_mean", "running_var")


class Frozen(nn.Module):
    """Four buffers, under `names`, and a forward in one of several `styles`."""

    def __init__(self, style: str, seed: int = 0, names: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        self.style, self.names = style, names
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(4, generator=generator) + 0.5, *torch.randn(2, 4, generator=generator)]
        drawn[0][1] *= -1
        for name, tensor in zip(names, (*drawn, torch.rand(4, generator=generator) + 0.5), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = (getattr(self, name).reshape(1, -1, 1, 1) for name in self.names)
        return STYLES[self.style](x, w, b, m, v)


def _scale_first(x: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor) -> Tensor:
    scale = w * (v + 1e-5).rsqrt()
    return x * scale + (b - m * scale)


STYLES: dict[str, Callable[..., Tensor]] = {
    "detr": _scale_first,
    "as it is defined": lambda x, w, b, m, v: (x - m) / torch.sqrt(v + 1e-3) * w + b,
    "a power": lambda x, w, b, m, v: w * ((x - m) * (v + 1e-2) ** -0.5) + b,
    "no epsilon": lambda x, w, b, m, v: (x - m) * (w / v.sqrt()) + b,
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "no bias used": lambda x, w, b, m, v: (x - m) / torch.sqrt(v + 1e-3) * w,
    "twice the bias": lambda x, w, b, m, v: (x - m) / torch.sqrt(v + 1e-3) * w + 2 * b,
}
STYLES |= OTHERS


@few
@given(st.sampled_from(sorted(STYLES.keys() - OTHERS.keys())), st.integers(0, 1000))
def test_it_folds_whatever_the_order_of_its_arithmetic(style: str, seed: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Frozen(style, seed), nn.ReLU())
    assert verdict(model, data(2, 3, 6, 6, seed=seed)) is None
    assert (
        verdict(nn.Sequential(nn.Tanh(), Frozen(style, seed), nn.Conv2d(4, 3, 2)), data(2, 4, 6, 6)) is None
    )


def test_its_epsilon_goes_with_the_plan_and_the_plan_fits_other_weights() -> None:
    model, other = (nn.Sequential(nn.Conv2d(3, 4, 3), Frozen("detr", seed)).eval() for seed in (1, 2))
    planned = plan_module_fold(model, observe(model, Inputs((data(1, 3, 6, 6).float(),))))
    plan = Plan.from_json(planned.plan.to_json())
    assert plan.eps == {"1": 1e-5}
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(replay_fold(other, plan)(x), other(x), rtol=1e-5, atol=1e-5)


def test_one_that_stays_takes_the_map_of_another_in() -> None:
    inner, outer = Frozen("detr", 1), Frozen("detr", 2)
    plan, _ = folded_exactly(nn.Sequential(nn.Softmax(1), inner, outer, nn.Tanh()), data(2, 4, 5, 5))
    assert len(plan.sites) == 1 and len(plan.skips) == 1


@pytest.mark.parametrize("style", sorted(OTHERS))
def test_what_its_four_tensors_make_in_another_way_folds_as_it_is(style: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(style), nn.ReLU())
    assert verdict(model, data(2, 3, 6, 6)) is None


def test_a_forward_that_does_more_gets_a_verdict_and_stays() -> None:
    class More(Frozen):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).relu()

    plan, _ = folded_exactly(nn.Sequential(nn.Conv2d(3, 4, 3), More("detr")), data(2, 3, 6, 6))
    assert [(skip.name, skip.reason) for skip in plan.skips] == [("1", Reason.CUSTOM_FORWARD)]


def test_one_that_runs_twice_is_counted_once() -> None:
    norm = Frozen("detr")
    model = Chain(nn.Conv2d(3, 4, 1), norm, nn.Sequential(norm, nn.Tanh()))
    assert verdict(model, data(2, 3, 5, 5)) is Reason.CALLED_MORE_THAN_ONCE


def test_the_public_fold_leaves_no_arithmetic_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Frozen("detr"), nn.ReLU()).eval()
    result = bntool.fold(model, torch.randn(1, 3, 8, 8))
    assert isinstance(result.model[1], nn.Identity)
    assert not dict(result.model.named_buffers())
