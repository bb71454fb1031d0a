"""`bntool.compare` and `bntool.bench` from Python."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bntool
from bntool.core.errors import UsageError


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)
    )


def parts() -> tuple[TensorDataset, TensorDataset]:
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, 8, 8, generator=drawn), torch.arange(40) % 2
    return TensorDataset(x[:30], y[:30]), TensorDataset(x[30:], y[30:])


def test_compare_trains_both_and_keeps_nothing_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = bntool.compare(model, parts(), epochs=2, batch_size=10)
    assert set(found.models) == {"plain", "batchnorm"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    assert "with BatchNorm" in str(found)
    records = found.watched("plain").progress.records
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]  # six steps, each looked into
    again = bntool.compare(model, parts(), tmp_path / "kept", epochs=2, batch_size=10)
    assert [run.to_dict() for run in again.runs] == [run.to_dict() for run in found.runs]
    assert json.loads((tmp_path / "kept" / "compare.json").read_text())["settings"]["epochs"] == 2


def test_compare_takes_references_and_says_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no setting 'epoch'") as caught:
        bntool.compare(net(), parts(), epoch=2)
    assert "epochs, batch_size" in caught.value.next_step
    with pytest.raises(UsageError, match="epochs is not given"):
        bntool.compare(net(), parts())
    with pytest.raises(UsageError, match="gives a list"):
        bntool.compare(net(), [1, 2, 3], epochs=1)
    torch.save(net(), "net.pt")
    assert bntool.compare("net.pt", parts(), epochs=1, batch_size=15).models


def test_bench_times_models_of_every_kind_beside_each_other(tmp_path):
    x = torch.randn(2, 1, 8, 8)
    model = net().eval()
    bntool.export_onnx(model, (x,), tmp_path / "net.onnx")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    found = bntool.bench(
        model, net(8).eval(), program, tmp_path / "net.onnx", example_inputs=(x,), batch_sizes=(2,), rounds=11
    )
    names = [row.name for row in found.rows]
    assert len(set(names)) == 4
    assert {row.provider for row in found.rows} == {"torch", "CPUExecutionProvider"}
    assert len(found.versus) == 3
    assert "rounds in turn" in str(found)
    with pytest.raises(UsageError, match="there are 1 models"):
        bntool.bench(model)
