"""What only a GPU can prove. Skips itself without one, unless BNTOOL_EXPECT_GPU=1 promised one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bntool.graph.inputs import Inputs
from bntool.runtime.doctor import diagnose
from bntool.runtime.libraries import CUDA
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference
from tests.exports import export_onnx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("BNTOOL_EXPECT_GPU") != "1", reason="no NVIDIA GPU"
    ),
]

IMAGE = Inputs((torch.zeros(1, 3, 32, 32),))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = network()
    return model, export_onnx(model, IMAGE, tmp_path_factory.mktemp("gpu") / "net.onnx").path


def test_the_doctor_ran_a_convolution_on_cuda():
    rows = {row.name: row for row in diagnose().rows}
    assert rows["CUDA provider"].detail == f"a convolution ran on {CUDA}"


def test_both_onnx_stages_pass_on_cuda(exported):
    model, path = exported
    checks = check_onnx(Reference(model, seeded_batches(IMAGE)), path, how=Conditions("cuda"))
    assert [(c.stage, c.passed, c.provider) for c in checks] == [
        ("export", True, CUDA),
        ("runtime", True, CUDA),
    ]
    assert all(c.device.startswith("cuda:0 (") for c in checks)


def test_auto_takes_cuda_where_it_works(exported):
    runner = OrtRunner(exported[1], "auto")
    assert runner.provider == CUDA
    assert runner.note == ""


@pytest.mark.parametrize("optimize", [False, True])
def test_the_profile_shows_every_kernel_on_cuda(exported, tmp_path, monkeypatch, optimize):
    import onnxruntime

    plain = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        options = plain()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", profiled)
    runner = OrtRunner(exported[1], "cuda", optimize=optimize)
    runner.run(seeded_batches(IMAGE)[1])
    events = json.loads(Path(runner._session.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    heavy = {k["provider"] for k in kernels if "Conv" in k["op_name"] or "Gemm" in k["op_name"]}
    assert heavy == {CUDA}


def test_tf32_is_off_unless_asked_for(exported):
    off, on = OrtRunner(exported[1], "cuda"), OrtRunner(exported[1], "cuda", tf32=True)
    taken = [r._session.get_provider_options()[CUDA]["use_tf32"] for r in (off, on)]
    assert taken == ["0", "1"]


def test_torch_runs_on_cuda_and_restores_its_flags():
    model = network()
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    runner = TorchRunner(model, "cuda")
    assert runner.device.startswith("cuda:0 (")
    assert next(model.parameters()).device.type == "cpu"
    runner.run(seeded_batches(IMAGE)[0])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_a_surgery_check_on_cuda_passes_and_fails_as_it_should():
    model, wrong = network(), network()
    wrong[3].weight.data.mul_(1.001)
    inputs = seeded_batches(IMAGE)
    (same,) = check_surgery(Reference(model, inputs), network(), stage="fold", how=Conditions("cuda"))
    (other,) = check_surgery(Reference(model, inputs), wrong, stage="fold", how=Conditions("cuda"))
    assert same.passed
    assert same.device.startswith("cuda:0 (")
    assert not other.passed
