"""What the tests of the laws share: a BatchNorm drawn at random, and the proof that a fold is exact."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bntool.core.plan import Plan
from bntool.core.reasons import Reason
from bntool.folding import plan_fold
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from bntool.surgery.fold_modules import apply_fold

EXACT = 1e-10
"""Relative to peak, in float64: some hundred roundings of 1e-16, times the condition of a small σ."""

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

few = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a BatchNorm is filled with. `gamma`: positive, negative, mixed, zero (some are), one."""

    gamma: str
    shift: bool
    eps: float
    variance: float
    seed: int

    @property
    def has_negative(self) -> bool:
        return self.gamma in ("negative", "mixed")

    def fill(self, norm: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
        torch.manual_seed(self.seed)
        norm.eps = self.eps
        shape = norm.running_mean.shape
        gamma = torch.rand(shape, dtype=torch.float64) + 0.5
        if self.gamma == "negative":
            gamma = -gamma
        elif self.gamma == "mixed":
            gamma[0] = -gamma[0]
        elif self.gamma == "zero":
            gamma[0] = 0.0
        norm.weight.data.copy_(gamma)
        norm.running_var.copy_(self.variance * (0.5 + torch.rand(shape)))
        if self.shift:
            norm.bias.data.copy_(torch.randn(shape))
            norm.running_mean.copy_(torch.randn(shape))
        return norm.double().eval()


numbers = st.builds(
    Numbers,
    gamma=st.sampled_from(["positive", "negative", "mixed", "zero"]),
    shift=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-5, 1e-3, 1e-1]),
    variance=st.sampled_from([0.0, 1e-8, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
)


class Chain(nn.Module):
    """first -> step (a plain function) -> second."""

    def __init__(self, first: nn.Module, step: Callable[[Tensor], Any], second: nn.Module) -> None:
        super().__init__()
        self.first, self.step, self.second = first, step, second

    def forward(self, x: Tensor) -> Any:
        return self.second(self.step(self.first(x)))


def folded_exactly(model: nn.Module, *inputs: Tensor) -> tuple[Plan, nn.Module]:
    """Plan and apply; whatever the verdicts, outputs agree and the original is bit-identical."""
    model = model.double().eval()
    before = copy.deepcopy(model.state_dict())
    plan = plan_fold(observe(model, Inputs(inputs)).graph)
    folded = apply_fold(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected, found = model(*(x.clone() for x in inputs)), folded(*(x.clone() for x in inputs))
    assert expected.shape == found.shape
    peak = float(expected.abs().max()) if expected.numel() else 0.0
    assert peak < float("inf")
    if expected.numel():
        assert float((expected - found).abs().max()) <= EXACT * peak
    return plan, folded


def verdict(model: nn.Module, *inputs: Tensor) -> Reason | None:
    """None where the only BatchNorm was folded (exactly), else why it was kept."""
    plan, _ = folded_exactly(model, *inputs)
    assert len(plan.sites) + len(plan.skips) == 1
    return plan.skips[0].reason if plan.skips else None


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
