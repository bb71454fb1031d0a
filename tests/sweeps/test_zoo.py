"""A sample of real architectures: how many BatchNorms fold, why the rest stay, and that nothing else changed.

The whole sweep over torchvision and timm is `make zoo`.
"""

from __future__ import annotations

import collections
import warnings

import pytest
import torch
from torch import nn

import bntool
from bntool.files.references import build
from bntool.graph.inputs import Inputs
from bntool.observe.eager import observe
from tools.sweeps.coverage_page import page
from tools.sweeps.zoo import judged, randomise

pytest.importorskip("torchvision")
pytest.importorskip("timm")

USED, NONLINEAR, UNSEEN = "output-used-elsewhere", "nonlinear", "not-observed"

# name -> folded, kept by reason. γ has both signs, which is why the maximum behind resnetv2's stem refuses,
# and the ReLU before those of convmixer's norms whose shift meets zero padding.
EXPECTED: dict[str, tuple[int, dict[str, int]]] = {
    "torchvision:resnet50": (53, {}),
    "torchvision:mobilenet_v3_small": (34, {}),
    "torchvision:efficientnet_b0": (49, {}),
    # pre-activation: a concat that later layers read too, then a ReLU
    "torchvision:densenet121": (62, {USED: 59}),
    # auxiliary heads that run in training only
    "torchvision:googlenet": (57, {UNSEEN: 2}),
    "torchvision:inception_v3": (94, {UNSEEN: 2}),
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn": (46, {}),
    "torchvision:shufflenet_v2_x1_0": (56, {}),
    "torchvision:mnasnet1_0": (52, {}),
    "torchvision:regnet_y_400mf": (53, {}),
    "torchvision:lraspp_mobilenet_v3_large": (47, {}),
    "torchvision:r3d_18": (20, {}),
    "timm:levit_128s": (52, {}),
    "timm:starnet_s1": (36, {}),
    "timm:repvgg_a0": (61, {}),
    "timm:mobileone_s0": (226, {}),
    "timm:repvit_m0_9": (108, {}),
    "timm:resnetv2_50": (36, {USED: 12, "negative-scale": 1}),
    "timm:convmixer_768_32": (33, {NONLINEAR: 32}),
    "timm:ghostnet_100": (80, {}),
    "timm:rexnet_100": (62, {}),
    "timm:skresnet18": (36, {}),
    "timm:dla34": (37, {}),
    "timm:ese_vovnet19b_dw": (23, {}),
    "timm:mobilevit_s": (32, {}),
}
SHAPES = {"timm:levit_128s": (3, 224, 224), "torchvision:r3d_18": (3, 4, 32, 32)}


@pytest.mark.parametrize("name", EXPECTED)
def test_verdicts_and_outputs(name: str) -> None:
    folded, kept = EXPECTED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # builders warn of what they will change
        model = build(name).model.eval()
    randomise(model)
    inputs = None
    if name in SHAPES or name.startswith("timm:"):
        shape = SHAPES.get(name, (3, 64, 64))
        inputs = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = bntool.fold(model, inputs)
    assert len(result.sites) == folded
    assert collections.Counter(skip.reason.value for skip in result.skips) == kept
    assert result.checks
    assert all(check.passed for check in result.checks)
    assert type(result.model) is type(model)
    left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in result.model.modules())
    assert left == sum(kept.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_row_says_what_a_fold_and_an_insertion_came_to() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    row = judged(make, lambda model: observe(model, Inputs.of(torch.randn(2, 3, 8, 8))))
    told = {
        key: row[key]
        for key in ("status", "bn_total", "folded", "sites", "sites_again", "insert_exact", "fx")
    }
    assert told == {
        "status": "ok", "bn_total": 1, "folded": 1, "sites": 1, "sites_again": 0, "insert_exact": True,
        "fx": "agrees",
    }  # fmt: skip
    assert row["float64"] < 1e-12
    text = page({"net": {"model": "net", **row}}, "Nets", "nets", "nets.jsonl")
    assert text.startswith("# Nets\n")
    assert "BatchNorm layers: 1; folded: 1 (100.0 %)" in text
    assert "- a second insertion, in 1 models: changes nothing" in text
