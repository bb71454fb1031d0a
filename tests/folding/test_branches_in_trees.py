"""Parallel branches that a user's own forward adds: one convolution, and zeros, which it adds still."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bntool
from bntool.core.errors import DamagedPlan
from bntool.core.plan import Plan
from bntool.layers import Absorbed
from tests.fold_zoo import enliven

EXACT = 1e-12
"""Relative to the peak: float64 has 2.2e-16, and a sum here some 40 terms on two levels."""


class Block(nn.Module):
    """A square convolution, a wide one, a high one, and the value itself, each with its BatchNorm."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.square = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False)
        self.high = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        for name in ("square_bn", "wide_bn", "high_bn", "own_bn"):
            setattr(self, name, nn.BatchNorm2d(4))
        self.gain = nn.Parameter(torch.tensor([0.5, -1.5, 2.0, 1.0]).reshape(4, 1, 1))

    def s(self, x: Tensor) -> Any:
        return self.square_bn(self.square(x))

    def w(self, x: Tensor) -> Any:
        return self.wide_bn(self.wide(x))

    def h(self, x: Tensor) -> Any:
        return self.high_bn(self.high(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.run(self, x))


def every_branch(m: Any, x: Tensor) -> Tensor:
    return m.s(x) + m.w(x) + m.h(x) + m.own_bn(x)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.w(x)  # the first branch is what the others are written into: it must be the one that stays
    y += m.s(x)
    y += m.own_bn(x)
    return y


def sizes_of_a_branch(m: Any, x: Tensor) -> Tensor:
    y = m.w(x)
    n, c, h, w = y.shape
    return (m.s(x) + y).reshape(n, c, h * w).reshape(n, c, h, w)


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "all": (every_branch, 1),
    "sum()": (lambda m, x: sum([m.s(x), m.w(x), m.own_bn(x)]), 1),
    "in place": (in_place, 1),
    "the value itself": (lambda m, x: x + m.s(x) + m.w(x), 1),
    "something else beside": (lambda m, x: m.s(x) + F.relu(m.h(x)) + m.w(x) + m.own_bn(x), 2),
    "halves": (lambda m, x: m.s(x) * 0.5 + 0.5 * m.w(x), 1),
    "parts of one": (lambda m, x: m.s(x) / 2 + m.w(x) * m.gain, 1),
    "one of no weight": (lambda m, x: m.s(x) * 0.0 + m.w(x), 1),
    "a mean of all": (lambda m, x: (m.s(x) + m.w(x) + m.h(x) + m.own_bn(x)) / 4, 1),
    "halves of all": (lambda m, x: 0.5 * m.s(x) + 0.5 * m.own_bn(x), 1),
    "a gain on one": (lambda m, x: m.s(x) + m.gain * m.wide(x), 1),
    "a difference": (lambda m, x: m.s(x) - m.w(x), 1),
    "a BatchNorm behind the sum": (lambda m, x: m.own_bn(m.square(x) + m.wide(x)), 1),
    "sizes of a branch": (sizes_of_a_branch, 1),
    "a gain on all": (lambda m, x: m.gain * (m.s(x) + m.w(x)), 1),
}
"""How a forward adds up its branches, and how many convolutions are left that run."""


def net_of(form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = enliven(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Block(FORMS[form][0])).double().eval())
    return model, torch.randn(2, 3, 7, 9, dtype=torch.float64)


def running(model: nn.Module, x: Tensor) -> list[str]:
    """The convolutions of the block that run."""
    ran: list[str] = []
    for name, module in model[2].named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(x)
    return ran


@pytest.mark.parametrize("form", FORMS)
def test_branches_that_a_forward_adds_become_one_convolution(form: str) -> None:
    model, x = net_of(form)
    result = bntool.fold(model, x, check="none")
    expected = model(x)
    assert (result.model(x) - expected).abs().max() <= EXACT * expected.abs().max()
    assert len(running(copy.deepcopy(result.model), x)) == FORMS[form][1]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ran_through(result.model, x))
    assert type(result.model[2]) is Block
    replayed = bntool.apply(model, Plan.from_json(result.plan.to_json())).model
    assert torch.equal(replayed(x), result.model(x))
    assert not bntool.fold(result.model, x, check="none").modified


def ran_through(model: nn.Module, x: Tensor) -> list[nn.Module]:
    ran: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in model.modules()]
    model(x)
    for handle in handles:
        handle.remove()
    return ran


def test_the_whole_fold_is_proved_and_its_file_has_as_many_convolutions(tmp_path: Path) -> None:
    model, x = net_of("all")
    result = bntool.fold(model, x)
    assert {row.passed for row in result.checks} == {True}
    assert [type(m) for m in (result.model[2].wide, result.model[2].own_bn)] == [Absorbed, Absorbed]
    narrow, x32 = result.model.float(), x.float()
    stream = io.BytesIO()
    torch.save(narrow, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x32), narrow(x32))
    path = tmp_path / "m.onnx"
    bntool.export_onnx(narrow, x32, path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Conv", "Relu", "Conv", "Relu"]


@pytest.mark.parametrize("stride", [1, 2])
def test_zeros_have_the_shape_of_the_branch(stride: int) -> None:
    """Unbatched images too, and a stride that does not divide the side."""
    conv = nn.Conv2d(3, 5, 3, stride=stride, padding=1, dilation=2)
    zeros = Absorbed(5, (stride, stride), (2, 2))
    for shape in [(2, 3, 11, 8), (3, 11, 8)]:
        x = torch.randn(shape)
        assert zeros(x).shape == conv(x).shape
        assert not zeros(x).any()


def _added_once_more(m: Any, x: Tensor) -> Tensor:
    y = m.square(x)
    return m.square_bn(y) + y


def _added_once_more_behind_another(m: Any, x: Tensor) -> Tensor:
    y = m.square(x)
    return m.square_bn(y) + x.tanh() + y


def _added_once_more_through_a_dropout(m: Any, x: Tensor) -> Tensor:
    y = m.square(x)
    return m.square_bn(y) + F.dropout(y, training=False)


def _added_once_more_as_a_copy(m: Any, x: Tensor) -> Tensor:
    y = m.square(x)
    return y.clone().add_(m.square_bn(y))


@pytest.mark.parametrize(
    "run",
    [
        _added_once_more,
        _added_once_more_behind_another,
        _added_once_more_through_a_dropout,
        _added_once_more_as_a_copy,
    ],
)
def test_a_branch_that_the_forward_adds_once_more_is_no_sum(
    run: Callable[[Any, Tensor], Tensor],
) -> None:
    model, x = enliven(Block(run)).double().eval(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    result = bntool.fold(model, x, check="none")  # by the laws alone
    assert not result.plan.merges
    torch.testing.assert_close(result.model(x), model(x), atol=EXACT, rtol=EXACT)


class OfItsOwn(nn.Conv2d):
    """A convolution whose forward may do anything with its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, padding=self.padding)


class NoConv(nn.Module):
    """A layer that computes a convolution and is none of torch's."""

    def __init__(self, kernel: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.padding = nn.Parameter(torch.randn(4, 4, *kernel)), padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, padding=self.padding)


@pytest.mark.parametrize("own", [lambda *of: OfItsOwn(4, 4, *of[:1], padding=of[1], bias=False), NoConv])
def test_only_a_plain_convolution_becomes_the_sum(own: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Block(lambda m, x: m.s(x) + m.w(x)), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for name, kernel, padding, heirs in (
        ("wide", (1, 3), (0, 1), ["square"]),
        ("square", (3, 3), (1, 1), []),
    ):
        setattr(model, name, own(kernel, padding))
        enliven(model).double().eval()
        result = bntool.fold(model, x, check="none")
        assert [merge.layer for merge in result.plan.merges] == heirs
        torch.testing.assert_close(result.model(x), model(x), atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("broken", ["window", "values", "layer", "twice", "map"])
def test_a_merge_that_does_not_fit_the_model_is_refused(broken: str) -> None:
    model, x = net_of("all")
    plan = bntool.plan_fold(model, x)
    (merge,) = plan.merges
    wrong = {
        "window": dataclasses.replace(merge, window=dataclasses.replace(merge.window, dilation=(9, 9))),
        "values": dataclasses.replace(merge, values=("0",)),
        "layer": dataclasses.replace(merge, layer="1"),
        "map": dataclasses.replace(
            merge, branches=(dataclasses.replace(merge.branches[0], map=("identity", 4)), *merge.branches[1:])
        ),
    }
    merges = (merge, merge) if broken == "twice" else (wrong[broken],)
    with pytest.raises(DamagedPlan) as refused:
        bntool.apply(model, Plan.from_dict(dataclasses.replace(plan, merges=merges).to_dict()))
    assert "merges[" in str(refused.value)


def test_no_merge_leaves_the_branches() -> None:
    model, x = net_of("all")
    result = bntool.fold(model, x, merge=False, check="none")
    assert not any(isinstance(module, Absorbed) for module in result.model.modules())
    assert len(running(result.model, x)) == 3
