from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests import broken
from tests.cli import nets
from tests.cli.conftest import Shell
from tests.exports import export_onnx

IMAGE = torch.zeros(1, 3, 12, 12)


@pytest.fixture
def files(folder: Path) -> Path:
    """`net.pt`, and `net.onnx`, which was exported from it."""
    nets.save(broken.network(), "net.pt")
    export_onnx(broken.network(), (IMAGE,), folder / "net.onnx")
    return folder


@pytest.mark.usefixtures("files")
def test_a_file_alone_is_compared_with_itself_at_every_level(bntool: Shell) -> None:
    said = bntool("verify", "net.onnx", "--json", "--repro", "repro")
    assert said.code == 0
    stages = [(check["stage"], check["batches"]) for check in said.document["checks"]]
    assert stages == [("basic", 3), ("extended", 3), ("all", 3)]
    assert "not run on CUDA" in said.document["checks"][-1]["detail"] or torch.cuda.is_available()
    assert not Path("repro").exists()
    said = bntool("verify", "net.onnx", "--input", "input:1x3x12x12", "--device", "cpu", "--check", "fast")
    assert (said.code, said.err) == (0, ""), said
    assert "the same class comes first for 100.00% of the samples" in said.out
    assert "a second run gives the same bits" in said.out


@pytest.mark.usefixtures("files")
def test_files_and_models_are_compared_in_either_order(bntool: Shell, refused: Shell) -> None:
    broken.broken_file(Path("net.onnx"), "wrong eps", Path("eps.onnx"))
    shutil.copyfile("net.onnx", "same.onnx")
    assert bntool("verify", "net.onnx", "same.onnx", "--json").document["status"] == "ok"
    failed = refused("verify", "eps.onnx", "net.onnx", "--json", code=1).document
    assert [check["stage"] for check in failed["checks"]] == ["verify", "runtime"]
    assert failed["blame"]["name"] == "bn2/BatchNormalization"
    for pair in (("eps.onnx", "net.pt"), ("net.pt", "eps.onnx")):
        text = refused("verify", *pair, *nets.INPUT, code=1, says="does not compute").out
        assert "first differs at bn2/BatchNormalization (BatchNormalization), export stage" in text
    assert bntool("verify", "net.pt", "net.onnx", *nets.INPUT).code == 0


@pytest.mark.usefixtures("files")
def test_a_mismatch_tells_the_tolerance_that_was_given(bntool: Shell, refused: Shell) -> None:
    nets.save(broken.broken_module(broken.network(), "one weight off by 1e-3"), "off.pt")
    for pair in (("net.pt", "off.pt", *nets.INPUT), ("off.pt", "net.onnx", *nets.INPUT)):
        assert bntool("verify", *pair, "--rtol", "0.1").code == 0
        text = refused("verify", *pair, "--rtol", "1e-7", code=1, says="allowed 1e-07 by rtol 1e-07")
        assert "1.0e-07" in text.out  # the limit of the rows
        refused("verify", *pair, "--atol", "1e-9", code=1, says="by atol 1e-09")


@pytest.mark.usefixtures("files")
def test_a_mismatch_leaves_a_repro_that_runs_by_itself(bntool: Shell) -> None:
    nets.save(broken.broken_module(broken.network(), "one weight off by 1e-3"), "off.pt")
    said = bntool("verify", "off.pt", "net.pt", *nets.INPUT, "--repro", "repro", "--json")
    assert said.code == 1
    assert said.document["blame"]["name"] == "conv2"
    assert said.document["blame"]["shape"] == [1, 8, 12, 12]
    ran = subprocess.run(
        [sys.executable, said.document["repro"]], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (1, "")
    again = bntool("verify", "off.pt", "net.pt", *nets.INPUT, "--repro", "repro")
    assert again.code == 2
    assert "is there already" in again.err


@pytest.mark.usefixtures("files")
def test_real_inputs(bntool: Shell, refused: Shell) -> None:
    images = np.random.default_rng(0).normal(size=(10, 3, 12, 12)).astype(np.float32)
    np.save("images.npy", images)
    np.savez("images.npz", input=images, labels=np.arange(10))
    torch.save(torch.from_numpy(images[:4]), "images.pt")
    for name, batches in (("images.npy", 4), ("images.npz", 4), ("images.pt", 3)):
        said = bntool("verify", "net.onnx", "net.pt", "--inputs", name, "--json")
        assert said.code == 0, said
        assert [check["batches"] for check in said.document["checks"]] == [batches] * 2
    alone = bntool("verify", "net.onnx", "--inputs", "images.npy", "--check", "fast", "--json")
    assert [check["batches"] for check in alone.document["checks"]] == [1] * 3
    refused("verify", "net.onnx", "net.pt", "--inputs", "none.npy", code=3, says="no such file")
    Path("text.npy").write_text("hello")
    refused("verify", "net.onnx", "net.pt", "--inputs", "text.npy", code=3, says="cannot read data")
    np.savez("two.npz", a=images, b=images)
    refused("verify", "net.onnx", "net.pt", "--inputs", "two.npz", code=2, says="several arrays")
    np.save("wide.npy", images[:, :2])
    refused("verify", "net.onnx", "--inputs", "wide.npy", code=2, says="and the file takes")


@pytest.mark.usefixtures("files")
def test_what_cannot_be_verified(refused: Shell) -> None:
    refused("verify", "net.onnx", "gone.onnx", code=3, says="no such file")
    refused("verify", "net.onnx", "--input", "labels:3", code=2, says="no such input")
    refused("verify", "net.onnx", "--input", "1x7x12x12", code=1, says="nothing to compare")
    refused("verify", "net.onnx", "--check", "none", code=2)
    if not torch.cuda.is_available():
        refused("verify", "net.onnx", "--device", "cuda", code=5)
    file = onnx.load("net.onnx")
    next(n for n in file.graph.node if n.op_type == "Relu").op_type = "Frobnicate"
    Path("op.onnx").write_bytes(file.SerializeToString())
    refused("verify", "op.onnx", code=3)


def test_the_export_that_a_fold_would_have_written_is_blamed(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bntool.pipeline import serving

    honest = serving.fold_exported

    def off(export, *args, **options):
        export = honest(export, *args, **options)
        broken.broken_file(export.path, "one weight off by 1e-3", export.path)
        return export

    nets.save(broken.network(), "net.pt")
    monkeypatch.setattr(serving, "fold_exported", off)
    said = bntool("fold", "net.pt", *nets.INPUT, "--export", "onnx", "--repro", "repro")
    assert said.code == 1
    assert "first differs at conv2/Conv (Conv), export stage" in said.out
    assert sorted(p.name for p in Path().iterdir()) == ["net.pt", "repro"]
    ran = subprocess.run([sys.executable, "repro/run.py"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_a_module_whose_layers_cannot_be_told_is_refused_all_the_same(refused: Shell) -> None:
    nets.save(nets.plain(), "a.pt")
    nets.save(nn.Sequential(nn.Conv2d(3, 2, 5)), "b.pt")
    document = refused("verify", "b.pt", "a.pt", *nets.INPUT, "--json", code=1).document
    assert json.dumps(document["blame"])
