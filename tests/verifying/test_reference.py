"""What a candidate is held against: how often the original runs, and the limits that come of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bntool
from bntool.core.tolerances import K_NOISE
from bntool.graph.inputs import Inputs
from bntool.verifying.checking import seeded_batches
from bntool.verifying.reference import Reference


class Counted(nn.Linear):
    """All copies count together."""

    runs: list[int]

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.runs = [0]

    def __deepcopy__(self, memo: dict[int, object]) -> Counted:
        other = Counted().to(self.weight.dtype)
        other.load_state_dict(self.state_dict())
        other.runs = self.runs
        return other

    def forward(self, x: Tensor) -> Tensor:
        self.runs[0] += 1
        return super().forward(x)


def test_the_rounding_is_drawn_seven_times_more() -> None:
    model = Counted()
    reference = Reference(model, seeded_batches(Inputs((torch.zeros(1, 6),)), (1, 2)))
    first = reference.limits
    assert model.runs == [2 * 2]  # in its own precision and in float64
    again = reference.redrawn_limits
    assert model.runs == [2 * (2 + 7)]
    assert all(again[name].limit >= first[name].limit for name in first)
    assert reference.exact_limits.keys() == first.keys()
    assert model.runs == [2 * (2 + 7 + 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_no_noise_is_measured_both_sides_may_walk(dtype: torch.dtype) -> None:
    """The reference carries a walk of eps/2 for each layer and the candidate K_NOISE times that, and its own
    weights one more: eps * sqrt(layers)."""

    class Narrow(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x.to(dtype))
            return result

    model = Narrow(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).to(dtype)
    reference = Reference(model, [Inputs((torch.ones(2, 6, dtype=dtype),))])
    (limit,) = reference.limits.values()
    walk = torch.finfo(dtype).eps * math.sqrt(4)
    assert limit.noise_floor == walk / 2
    assert limit.limit == pytest.approx((K_NOISE / 2 + 1) * walk, rel=1e-12)
    assert (reference.exact is None) == (dtype is torch.float32)


class Decides(nn.Module):
    """One output, or both, by which rounding falls: a comparison of numbers that are equal but for it."""

    def __init__(self, *, all_of_them: bool) -> None:
        super().__init__()
        self.layer, self.third = nn.Linear(6, 6), nn.Parameter(torch.tensor(3.0))
        self.all_of_them = all_of_them

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        fell = (y / self.third * self.third == y).to(y.dtype)
        return {"fell": fell, "other": fell * 2 if self.all_of_them else y}


@pytest.mark.parametrize("all_of_them", [True, False])
def test_parts_are_compared_where_rounding_decides_every_output(all_of_them: bool) -> None:
    torch.manual_seed(0)
    inputs = seeded_batches(Inputs((torch.zeros(1, 6),)), (50,))
    reference = Reference(Decides(all_of_them=all_of_them), inputs)
    assert reference.limits["fell"].undecidable
    assert bool(reference.limits["other"].undecidable) == all_of_them
    found = reference.decidable()
    assert (found is reference) == (not all_of_them)
    assert found.parts == all_of_them
    assert ("rounding decides every output" in found.detail) == all_of_them


class _NotInFloat64(nn.Module):
    """Eight folds of activations far from zero; a float32 product inside keeps it from float64."""

    def __init__(self) -> None:
        super().__init__()
        steps = [(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.BatchNorm2d(16)) for i in range(8)]
        for conv, norm in steps:
            nn.init.constant_(conv.bias, 20.0)
            norm.running_mean.fill_(20.0)
            norm.running_var.fill_(0.05)
        self.body = nn.Sequential(*(nn.Sequential(conv, norm, nn.ReLU()) for conv, norm in steps))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)[:, :, 0, 0]
        return self.head(
            features + torch.zeros(1, 16, dtype=torch.float32) @ self.head.weight.T @ self.head.weight
        )


@pytest.mark.parametrize("seed", [1, 3, 5])  # those at which the derived limit was too narrow
def test_without_float64_the_noise_is_drawn_from_shaken_copies(seed: int) -> None:
    torch.manual_seed(seed)
    result = bntool.fold(_NotInFloat64().eval(), torch.randn(1, 3, 24, 24))
    assert len(result.sites) == 8, result.skips
    assert "does not run in float64" in result.checks[0].detail
    assert "not proved on other sizes" in result.checks[0].detail


def test_without_float64_a_wrong_model_is_still_wrong() -> None:
    torch.manual_seed(1)
    model, x = _NotInFloat64().eval(), torch.randn(1, 3, 24, 24)
    wrong = bntool.fold(model, x).model
    with torch.no_grad():
        wrong.head.weight.mul_(1.01)  # a hundredth, where float32 carries some 1e-4 to the outputs
    (row,) = bntool.verify(model, wrong, x, check="fast").checks
    assert not row.passed
