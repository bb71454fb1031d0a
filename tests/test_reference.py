"""What a candidate is held against: how often the original runs, and the limits that come of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bntool.graph.inputs import Inputs
from bntool.verifying.checking import seeded_batches
from bntool.verifying.comparing import K_NOISE
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
