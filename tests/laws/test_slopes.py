"""PReLU: a negative scale passes it where its own slope can turn over."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bntool
from bntool.core.reasons import Reason
from tests.laws.exactness import Chain, Numbers, data, few, folded_exactly, numbers, verdict
from tests.laws.test_pointwise import both_ways


def sloped(*slopes: float) -> nn.PReLU:
    layer = nn.PReLU(len(slopes)).double()
    layer.weight.data = torch.tensor(slopes, dtype=torch.float64)
    return layer


@few
@given(numbers, st.integers(0, 99))
def test_a_slope_for_each_channel_turns_over_where_the_scale_is_negative(fill: Numbers, seed: int) -> None:
    step = sloped(*(data(4, seed=seed).abs() + 0.05).tolist())
    up, down = both_ways(step, fill)
    assert up is (Reason.NONLINEAR if fill.shift else None)
    assert (down is None) == (not fill.shift)


@few
@given(numbers)
def test_one_slope_turns_over_where_every_scale_is_negative(fill: Numbers) -> None:
    fill = Numbers(fill.gamma, False, fill.eps, fill.variance, fill.seed)
    up, _ = both_ways(sloped(0.25), fill)
    assert up is (Reason.NEGATIVE_SCALE if fill.gamma == "mixed" else None)


@few
@given(numbers, st.sampled_from([0.0, -0.5]))
def test_a_slope_that_is_not_positive_stays(fill: Numbers, slope: float) -> None:
    fill = Numbers(fill.gamma, False, fill.eps, fill.variance, fill.seed)
    up, _ = both_ways(sloped(slope, 0.5, 0.5, 0.5), fill)
    assert up is (Reason.NEGATIVE_SCALE if fill.has_negative else None)


def norm(gamma: str = "mixed") -> nn.Module:
    return Numbers(gamma, False, 1e-5, 1.0, 3).fill(nn.BatchNorm2d(4))


def test_a_slope_that_two_calls_read_stays() -> None:
    shared = sloped(0.2, 0.5, 0.5, 0.5)
    model = nn.Sequential(Chain(nn.Conv2d(4, 4, 1), shared, norm()), nn.Tanh(), nn.Conv2d(4, 4, 1), shared)
    assert verdict(model, data(2, 4, 5, 3)) is Reason.NEGATIVE_SCALE
    plan, _ = folded_exactly(nn.Sequential(nn.Conv2d(4, 4, 1), shared, norm(), nn.Tanh()), data(2, 4, 5, 3))
    assert len(plan.sites) == 1


def test_two_batchnorms_do_not_turn_one_slope_twice() -> None:
    model = nn.Sequential(nn.Softmax(1), norm(), sloped(0.2, 0.5, 0.7, 0.5), nn.Conv2d(4, 4, 1))
    before = nn.Sequential(nn.Conv2d(4, 4, 1), sloped(0.2, 0.5, 0.7, 0.5), norm(), norm(), nn.Tanh())
    for net in (model, before):
        plan, _ = folded_exactly(net, data(2, 4, 5, 3))
        assert plan.sites


def test_in_a_program_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), sloped(0.2, 0.5, 0.7, 0.5), norm(), nn.Tanh()).double().eval()
    x = data(2, 3, 6, 6)
    program = torch.export.export(model, (x,))
    result = bntool.fold(program, x)
    assert len(result.sites) == 1
    torch.testing.assert_close(result.model.module()(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_in_an_onnx_file_too(shared: bool, tmp_path: Path) -> None:
    """A slope that two nodes read stays as it is."""
    first, second = (sloped(0.2, 0.5, 0.7, 0.5) for _ in range(2))
    layers = nn.Conv2d(4, 4, 3), first, norm(), nn.Sigmoid(), nn.Conv2d(4, 4, 1), second
    x = data(2, 4, 6, 6).float()
    path = bntool.export_onnx(nn.Sequential(*layers).float().eval(), x, tmp_path / "m.onnx")
    if shared:
        held = onnx.load(path)
        one, other = (node for node in held.graph.node if node.op_type == "PRelu")
        other.input[1] = one.input[1]
        onnx.save(held, path)
    result = bntool.fold(path)
    assert [skip.reason for skip in result.skips] == ([Reason.NEGATIVE_SCALE] if shared else [])
    assert len(result.sites) == 1 - shared
    assert all(check.passed for check in result.checks)


def test_a_function_with_a_stored_slope_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), norm()
            self.slope = nn.Parameter(torch.tensor([0.2, 0.5, 0.7, 0.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(F.prelu(self.conv(x), self.slope))

    assert verdict(Net(), data(2, 4, 5, 3)) is None
