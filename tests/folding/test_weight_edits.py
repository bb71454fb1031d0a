"""What a layer that would take a map in must not do: change what others read, or run more than once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data, folded_exactly

SHIFTED, SCALED = (Numbers("positive", shift, 1e-5, 1.0, 0) for shift in (True, False))


def flat(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(("fill", "goes"), [(SHIFTED, False), (SCALED, True)])
def test_a_shift_that_goes_in_at_the_input_moves_the_bias_and_a_scale_does_not(
    fill: Numbers, goes: bool
) -> None:
    a, b = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
    b.bias = a.bias
    net = Net(
        lambda m, x: flat(m.a(m.bn(x.tanh())), m.b(x)), {"a": a, "b": b, "bn": fill.fill(nn.BatchNorm2d(4))}
    )
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert [site.into for site in plan.fold_sites] == ([("a",)] if goes else [])
    assert all("shares a.bias" in skip.detail for skip in plan.skips)


def test_a_bias_that_is_computed_takes_no_shift() -> None:
    net = Net(
        lambda m, x: nn.functional.conv2d(m.bn(x.tanh()), m.a.weight, m.a.bias * 2),
        {"a": nn.Conv2d(4, 6, 1), "bn": SHIFTED.fill(nn.BatchNorm2d(4))},
    )
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert "the bias of conv is computed" in plan.skips[0].detail


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_that_runs_twice_takes_nothing_in(affine: bool) -> None:
    second = nn.BatchNorm2d(4, affine=affine)
    nn.init.normal_(second.running_mean)
    net = Net(
        lambda m, x: m.n2(m.n1(x.tanh())).tanh() + m.n2(x).tanh(),
        {"n1": SHIFTED.fill(nn.BatchNorm2d(4)), "n2": second},
    )
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    first, _ = plan.skips
    assert first.reason is Reason.NONLINEAR
    assert "runs 2 times" in first.detail
