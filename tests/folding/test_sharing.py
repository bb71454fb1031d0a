"""Who holds a tensor without reading it: a layer that did not run would change with the one that did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data, folded_exactly


def parts() -> dict[str, Any]:
    norm = Numbers("positive", True, 1e-5, 1.0, 0).fill(nn.BatchNorm2d(4))
    return {"conv": nn.Conv2d(4, 4, 1), "idle": nn.Conv2d(4, 4, 1), "bn": norm}


def tie_weight(m: Any) -> None:
    m.idle.weight = m.conv.weight


def tie_bias(m: Any) -> None:
    m.idle.bias = m.conv.bias


def straight(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("tie", [tie_weight, tie_bias])
def test_what_an_idle_layer_holds_too_stays(tie: Callable[[Any], None]) -> None:
    net = Net(straight, parts())
    tie(net)
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    (skip,) = plan.skips
    assert skip.reason is Reason.WEIGHT_SHARED
    assert "and did not run" in skip.detail


def test_a_layer_under_two_names_is_no_idle_one() -> None:
    net = Net(straight, parts())
    net.idle = net.conv
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert [site.into for site in plan.fold_sites] == [("conv",)]


def test_a_weight_that_a_block_holds_beside_its_layer_is_no_idle_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.kernel = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x)
            return result

    net = Net(straight, {**parts(), "conv": Block()})
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert [site.bn for site in plan.fold_sites] == ["bn"]


def test_a_parameter_in_a_list_is_no_idle_layer() -> None:
    net = Net(straight, parts())
    net.held = nn.ParameterList([net.conv.weight])
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert len(plan.skips) + len(list(plan.fold_sites)) == 1
