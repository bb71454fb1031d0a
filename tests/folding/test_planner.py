"""Which way a BatchNorm goes, and how often those that stayed are tried again."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data, folded_exactly


@pytest.mark.parametrize(("gamma", "goes"), [("positive", True), ("zero", False)])
def test_a_shift_goes_before_a_scale_only_where_no_channel_is_scaled_by_zero(gamma: str, goes: bool) -> None:
    """The scale cannot pass the sum, the shift not the ReLU: the shift goes up as t/s, the scale down."""
    norm = Numbers(gamma, True, 1e-5, 1.0, 0).fill(nn.BatchNorm2d(4))
    parts = {"first": nn.Conv2d(4, 4, 1), "bn": norm, "second": nn.Conv2d(4, 3, 3, padding=1)}
    net = Net(lambda m, x: m.second(m.bn(m.first(x) + x).relu()), parts)
    plan, _ = folded_exactly(net, data(2, 4, 5, 5))
    assert [set(site.into) for site in plan.fold_sites] == ([{"first", "second"}] if goes else [])


@pytest.mark.parametrize(("norms", "left"), [(5, []), (6, ["n0"])])
def test_a_fold_opens_the_way_for_the_one_before_in_five_passes(norms: int, left: list[str]) -> None:
    """Each but the first runs twice, so nothing goes into it: its neighbour waits until it has gone."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.n0(x.tanh())
        beside = []
        for i in range(1, norms):
            beside.append(m.get_submodule(f"d{i}")(m.get_submodule(f"n{i}")(x.tanh())))
            y = m.get_submodule(f"n{i}")(y)
        return sum(beside, m.out(y))  # type: ignore[no-any-return]

    fill = Numbers("positive", True, 1e-5, 1.0, 0)
    parts: dict[str, nn.Module] = {f"n{i}": fill.fill(nn.BatchNorm2d(4)) for i in range(norms)}
    parts |= {f"d{i}": nn.Conv2d(4, 3, 1) for i in range(1, norms)} | {"out": nn.Conv2d(4, 3, 1)}
    plan, _ = folded_exactly(Net(run, parts), data(2, 4, 5, 5))
    assert [skip.name for skip in plan.skips] == left
