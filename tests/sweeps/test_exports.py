"""The sweep of exports: what a row holds, and what the page makes of it."""

from __future__ import annotations

import json

import pytest
from torch import nn

from bntool.files import references
from tools.sweeps import exports


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )


def test_a_model_is_folded_exported_and_checked_in_three_stages(monkeypatch):
    class Built:
        model = small()

    monkeypatch.setattr(references, "build", lambda name: Built)
    row = exports.examine("torchvision:small")
    assert row["status"] == "ok"
    assert (row["folded"], row["left"]) == (1, 1)
    assert sum(row["kept"].values()) == 1  # the shift of the second passes no ReLU and no zero padding
    assert {"fold", "export", "runtime"} <= row["stages"].keys()
    assert json.loads(json.dumps(row)) == row


def test_the_page_counts_and_lists_what_failed():
    good = {"status": "ok", "opset": 18, "nodes": 9, "left": 0, "kept": {}, "stages": {"fold": 1.0}}
    rows = {
        "torchvision:a": {"model": "torchvision:a", **good},
        "torchvision:b": {"model": "torchvision:b", **good, "left": 2, "kept": {"nonlinear": 2}},
        "timm:c": {"model": "timm:c", "status": "failed", "error": "ExportError: a | b\nsecond line"},
    }
    text = exports.page(rows, 5)
    assert "tried: 3 of 5" in text
    assert "in the fold, export and runtime stages: 2" in text
    assert "nodes that the others keep, each with a reason: 2" in text
    assert "| torchvision:b | 18 | 9 | 2: 2 nonlinear | 1.0 |" in text
    assert "- timm:c: failed ExportError: a / b second line" in text


def test_the_sweep_covers_what_it_promises():
    pytest.importorskip("torchvision")
    names = exports.every_model()
    assert len(names) == len(set(names))
    assert sum(name.startswith("timm:") for name in names) >= 60
    assert {"torchvision:resnet50", "torchvision:fcn_resnet50", "torchvision:r3d_18"} <= set(names)
    timm = pytest.importorskip("timm")
    assert [n for n in names if n.startswith("timm:") and n[5:] not in timm.list_models()] == []
