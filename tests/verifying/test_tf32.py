"""TF32: what it does to a model, emulated, and the row that tells of it."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn

from bntool.core.verdicts import first_failed
from bntool.graph.inputs import Inputs
from bntool.precision.casting import TF32, round_to_tf32, tf32_copy
from bntool.results.checks import Comparison
from bntool.runtime.libraries import CPU, CUDA, TENSORRT
from bntool.verifying import export_checking
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.onnx_verifying import check_itself
from bntool.verifying.reference import Reference
from bntool.verifying.tf32 import check_tf32, no_tf32
from tests import broken
from tests.exports import export_onnx

FLOAT32 = torch.finfo(torch.float32).eps
INPUTS = [Inputs((torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)),))]


def test_factors_are_rounded_to_ten_bits_of_fraction():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    wide = x.double()
    unit = torch.pow(2.0, wide.abs().log2().floor() - 10)
    expected = wide.sign() * (wide.abs() / unit + 0.5).floor() * unit  # nearest, ties away from zero
    assert torch.equal(round_to_tf32(x).double(), expected)
    ties = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 0.0, -0.0])
    assert round_to_tf32(ties).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 1.0, 0.0, -0.0]
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(round_to_tf32(odd).nan_to_num(7), odd.nan_to_num(7))
    strided = torch.randn(4, 6)[:, ::2].T
    assert torch.equal(round_to_tf32(strided), round_to_tf32(strided.contiguous()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 5), (3, 7)),
        (nn.Linear(7, 5), (2, 3, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    ],
)
def test_a_product_takes_rounded_factors_and_adds_a_full_bias(layer, shape):
    nn.init.constant_(layer.bias, 1 + 2.0**-15)  # TF32 would make 1 of it
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = layer.weight.clone()
    with torch.no_grad():
        got = tf32_copy(layer)(x).double()
        wide = tf32_copy(layer).double()
        wide.__dict__.pop("forward")
        wide.weight.copy_(round_to_tf32(layer.weight))
        expected = wide(round_to_tf32(x).double())
    terms = layer.weight[0].numel() + 1
    assert float((got - expected).abs().max()) <= terms * FLOAT32 * float(expected.abs().max() + 1)
    assert torch.equal(layer.weight, before)


def in_tf32(model: nn.Module, factor: float = 1.0):
    """Stands for `OrtRunner` on CUDA: full float32, or with `tf32` what TF32 makes, times `factor`."""

    class Runner:
        label, provider, device, note, cpu_nodes, input_names = "", CUDA, "cuda:0 (a card)", "", (), ("x",)

        def __init__(self, path, device, *, optimize=True, tf32=False) -> None:
            self._model, self._factor = (tf32_copy(model), factor) if tf32 else (model, 1.0)

        def accepts(self, inputs: Inputs) -> bool:
            return True

        def run(self, inputs: Inputs) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return {"output": self._model(*inputs.args) * self._factor}

    return Runner


def no_slack(path):
    """What a file without a Sigmoid at its end would say; there is none here."""
    return types.SimpleNamespace(slack={"output": 0.0})


def test_the_row_has_a_limit_of_its_own_and_tells_it(monkeypatch):
    model = broken.network()
    monkeypatch.setattr(export_checking, "OrtRunner", in_tf32(model))
    monkeypatch.setattr(export_checking, "OutputTraits", no_slack)
    *rows, row = check_onnx(Reference(model, INPUTS), "m.onnx", how=Conditions("cuda", tf32=True))
    assert [(r.stage, r.precision, r.passed) for r in rows] == [("export", "", True), ("runtime", "", True)]
    assert (row.stage, row.precision, row.passed, row.decides) == ("runtime", "TF32", True, False)
    # It would fail as full float32, and its own limit is far from letting everything pass.
    assert row.relative > 10 * rows[-1].limit
    assert 8 * row.noise_floor < row.limit < 0.1
    assert row.limit >= TF32.eps * math.sqrt(8)
    text = str(Comparison((*rows, row)))
    assert "runtime TF32" in text
    assert "within" in text
    assert "the noise floor is that of TF32, emulated in torch" in text


def test_a_row_beyond_its_limit_is_told_and_decides_nothing(monkeypatch):
    model = broken.network()
    monkeypatch.setattr(export_checking, "OrtRunner", in_tf32(model, 1.5))
    monkeypatch.setattr(export_checking, "OutputTraits", no_slack)
    rows = check_onnx(Reference(model, INPUTS), "m.onnx", how=Conditions("cuda", tf32=True))
    assert [row.passed for row in rows] == [True, True, False]
    assert first_failed(rows) is None
    assert Comparison(tuple(rows))
    assert "beyond" in str(Comparison(tuple(rows)))
    assert not Comparison((rows[-1],))  # nothing that decides is no pass


def test_a_torch_model_with_tf32(monkeypatch):
    model = broken.network()
    # The flags change nothing on the CPU, so the row is full float32 here.
    row = check_tf32(model, Reference(model, INPUTS), device="cpu")
    assert (row.stage, row.precision, row.passed) == ("verify", "TF32", True)
    assert not check_tf32(broken.broken_module(model, "two channels swapped"), Reference(model, INPUTS),
                          device="cpu").passed  # fmt: skip


def test_where_there_is_no_tf32_the_row_says_why(tmp_path):
    assert no_tf32(CPU, FLOAT32) == f"no TF32 row: TF32 needs an NVIDIA GPU, and this ran on {CPU}"
    assert "float32 numbers" in no_tf32(CUDA, 2.0**-10)
    model = broken.network()
    path = export_onnx(model, INPUTS[0], tmp_path / "m.onnx").path
    rows = check_onnx(Reference(model, INPUTS), path, how=Conditions(tf32=True))
    assert [row.precision for row in rows] == ["", ""]
    assert "TF32 needs an NVIDIA GPU" in rows[-1].detail
    alone = check_itself(path, INPUTS, how=Conditions("cpu", tf32=True))
    assert [row.precision for row in alone] == [""] * 3
    assert "TF32 needs an NVIDIA GPU" in alone[-1].detail


def test_a_card_older_than_ampere_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "older than Ampere" in no_tf32(CUDA, FLOAT32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert [no_tf32(where, FLOAT32) for where in (CUDA, TENSORRT, "cuda:0")] == ["", "", ""]
