"""Weights that layers compute from their parameters, stored on request."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bntool
from bntool.core.errors import UsageError
from bntool.core.plan import Plan
from tests.fold_zoo import enliven


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / spread, self.bias, self.stride, self.padding)


class AtMostOne(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.renorm(weight, 2, 0, 1.0)


def of(kind: str) -> nn.Module:
    conv = Standardised(3, 4, 3) if kind == "standardised" else nn.Conv2d(3, 4, 3, padding=1, bias=False)
    if kind == "weight_norm":
        parametrizations.weight_norm(conv)
    elif kind == "spectral_norm":
        parametrizations.spectral_norm(conv)
    elif kind == "older weight_norm":
        torch.nn.utils.weight_norm(conv)
    elif kind == "older spectral_norm":
        torch.nn.utils.spectral_norm(conv)
    elif kind == "pruned":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    elif kind == "largest norm":
        parametrize.register_parametrization(conv, "weight", AtMostOne())
    return conv


KINDS = "weight_norm,spectral_norm,older weight_norm,older spectral_norm,pruned,largest norm,standardised"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS.split(","))
def test_what_is_baked_folds_and_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model = enliven(nn.Sequential(of(kind), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for _ in range(3):
        model.train()(x)  # spectral normalisation measures in train mode
    model.eval()
    before = copy.deepcopy(model.state_dict())
    kept = bntool.fold(model, x)
    assert [skip.reason.value for skip in kept.skips] == ["weight-computed"]
    assert "--bake" in kept.skips[0].detail
    result = bntool.fold(model, x, bake=True)
    assert len(result.sites) == 1 and type(result.model[0]) is nn.Conv2d
    assert any("made plain (0)" in note for note in result.plan.notes)
    # as many roundings as a fold of a plain layer
    assert (result.model(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = bntool.apply(model, Plan.from_json(result.plan.to_json()), x).model
    assert torch.equal(again(x), result.model(x))
    assert set(result.model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    copy.deepcopy(result.model)


def test_a_model_with_nothing_to_bake_is_folded_as_ever() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert not any("plain" in note for note in bntool.fold(model, bake=True).plan.notes)


def test_a_layer_that_does_more_with_its_data_stays_as_it_is() -> None:
    class Padded(Standardised):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    model = nn.Sequential(Padded(3, 4, 3), nn.BatchNorm2d(4)).eval()
    result = bntool.fold(model, torch.randn(1, 3, 8, 8), bake=True)
    assert type(result.model[0]) is Padded and len(result.skips) == 1


def test_a_cast_is_no_computing() -> None:
    class Cast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model = Cast(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    result = bntool.fold(model, torch.randn(1, 3, 8, 8), bake=True)
    assert [skip.reason.value for skip in result.skips] == ["weight-computed"]
    assert "--bake" not in result.skips[0].detail and not any("plain" in n for n in result.plan.notes)


def test_a_program_is_told_that_it_has_no_layers_to_store_them() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 8, 8),))
    with pytest.raises(UsageError, match="--bake is not for an exported program"):
        bntool.fold(program, bake=True)
