from __future__ import annotations

import pytest
import torch
from torch import nn

from bntool.precision.perturbing import shaken_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_has_the_variance_of_a_rounding(dtype):
    torch.manual_seed(0)
    model = nn.Linear(400, 400).to(dtype)
    eps = torch.finfo(dtype).eps
    shaken = shaken_copy(model, eps, 0)
    before, after = model.weight.detach(), shaken.weight.detach()
    ulp = (torch.nextafter(before.abs(), torch.full_like(before, torch.inf)) - before.abs()).double()
    moved = (after.double() - before.double()) / ulp
    assert set(moved.unique().tolist()) <= {-1.0, 0.0, 1.0}
    n = moved.numel()
    # The mean square of n such numbers scatters by sqrt(p (1 - p) / n) about p = 1/12: four times that.
    assert float(moved.square().mean()) == pytest.approx(1 / 12, abs=4 * (11 / 144 / n) ** 0.5)
    assert float(moved.mean()) == pytest.approx(0, abs=4 * (1 / 12 / n) ** 0.5)


def test_zeros_stay_and_the_model_is_not_touched():
    model = nn.BatchNorm2d(64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    shaken = shaken_copy(model, torch.finfo(torch.float32).eps, 1)
    assert torch.equal(shaken.bias, before["bias"]) and torch.equal(
        shaken.running_mean, before["running_mean"]
    )
    assert not torch.equal(shaken.weight, before["weight"])
    assert shaken.num_batches_tracked == before["num_batches_tracked"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    shaken = shaken_copy(model, torch.finfo(torch.float32).eps, 0, torch.float64)
    assert shaken[1].weight is shaken[0].weight
    assert shaken[0].weight.dtype == torch.float64
