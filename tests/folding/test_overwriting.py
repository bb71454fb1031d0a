"""In-place writes around a BatchNorm that goes: its output is then the memory of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bntool.core.reasons import Reason
from tests.fold_zoo import Net
from tests.laws.exactness import Numbers, data, folded_exactly

PARTS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 1),
    "bn": lambda: Numbers("positive", True, 1e-5, 1.0, 0).fill(nn.BatchNorm2d(4)),
    "out": lambda: nn.Conv2d(4, 4, 1),
}


def folded(run: Callable[[Any, Tensor], Tensor]) -> Any:
    net = Net(run, {name: make() for name, make in PARTS.items()})
    with torch.no_grad():
        return folded_exactly(net, data(2, 4, 5, 5))[0]


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.mul_(2.0),
        lambda y: y[:, :2].mul_(2.0),
        lambda y: torch.add(torch.ones_like(y), 1.0, out=y),
        lambda y: torch.max(torch.ones(2, 4, 5, 5, 2).to(y), -1, out=(y, torch.zeros_like(y).long()))[0],
    ],
)
def test_a_later_write_to_what_others_read_keeps_it(write: Callable[[Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        normed = m.bn(y)
        out = m.out(normed)
        write(normed)
        return torch.cat([out, y, normed])

    plan = folded(run)
    assert [site.bn for site in plan.fold_sites] == []


@pytest.mark.parametrize("write", [lambda y: y.add_(1.0), lambda y: torch.mul(y, 2.0, out=y)])
def test_a_write_before_it_ran_is_no_reason(write: Callable[[Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        write(y)
        return m.out(m.bn(y)) + y

    plan = folded(run)
    assert [site.into for site in plan.fold_sites] == [("out",)]


def test_a_write_to_what_nobody_else_reads_is_no_reason() -> None:
    plan = folded(lambda m, x: m.out(m.bn(m.conv(x)).mul_(2.0)))
    assert [site.into for site in plan.fold_sites] == [("conv",)]


@pytest.mark.parametrize(
    ("write", "what"), [(lambda x, y: torch.add(x, 1.0, out=y), "add"), (lambda x, y: y.mul_(2.0), "mul")]
)
def test_a_later_write_to_its_input_keeps_it_too(write: Callable[..., Tensor], what: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).tanh()
        normed = m.bn(y)
        write(x, y)
        return m.out(normed) + y

    (skip,) = folded(run).skips
    assert skip.reason is Reason.OUTPUT_USED_ELSEWHERE
    assert f"{what} would write in place what others read" in skip.detail
