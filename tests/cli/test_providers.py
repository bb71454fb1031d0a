from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bntool.runtime.libraries import CPU, CUDA, TENSORRT
from tests import broken
from tests.cli import nets
from tests.cli.conftest import Shell
from tests.exports import export_onnx

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def _files(folder: Path) -> None:
    nets.save(broken.network(), "net.pt")
    nets.save(broken.network(), "same.pt")
    export_onnx(broken.network(), (torch.zeros(1, 3, 12, 12),), folder / "net.onnx")
    shutil.copyfile("net.onnx", "same.onnx")


def test_providers_by_their_own_names(bntool: Shell, refused: Shell) -> None:
    for words in (("net.onnx",), ("net.onnx", "net.pt", *nets.INPUT)):
        said = bntool("verify", *words, "--providers", CPU, "--check", "fast", "--json")
        assert {check["provider"] for check in said.document["checks"]} == {CPU}
    refused("verify", "net.onnx", "--providers", "cpu", code=2, says=f"did you mean {CPU}?")
    refused("verify", "net.onnx", "--providers", "CUDAExecutionProvidr", code=2, says=CUDA)
    refused("verify", "net.onnx", "--providers", f"{CPU},{CUDA}", code=2, says="takes every node")
    refused("verify", "net.onnx", "--providers", ",", code=2, says="empty name")
    refused("verify", "net.onnx", "--providers", CPU, "--device", "cpu", code=2, says="both say where")
    refused("fold", "net.pt", *nets.INPUT, "--providers", CPU, code=2, says="is for the ONNX file")
    refused("verify", "net.pt", "same.pt", *nets.INPUT, "--providers", CPU, code=2, says="no ONNX file")


def test_providers_say_where_the_file_of_a_program_runs(bntool: Shell, folder: Path) -> None:
    program = torch.export.export(broken.network(), (torch.zeros(1, 3, 12, 12),))
    torch.export.save(program, folder / "net.pt2")
    said = bntool("verify", "net.onnx", "net.pt2", "--providers", CPU, "--check", "fast", "--json")
    assert {check["provider"] for check in said.document["checks"]} == {CPU}


@no_gpu
def test_no_flags_print_a_pass_for_what_did_not_run(refused: Shell) -> None:
    for named in (CUDA, TENSORRT, f"{TENSORRT},{CUDA}", f"{CUDA},{CPU}", f"{TENSORRT},{CUDA},{CPU}"):
        for words in (
            ("verify", "net.onnx"),
            ("verify", "net.onnx", "net.pt", *nets.INPUT),
            ("verify", "net.onnx", "same.onnx"),
            ("fold", "net.onnx"),
            ("fold", "net.pt", *nets.INPUT, "--export", "onnx"),
            ("export", "net.pt", *nets.INPUT, "--force"),
            ("bench", "net.onnx", "net.onnx"),
        ):
            said = refused(*words, "--providers", named, code=5)
            assert "passed" not in said.out
            assert ".so" in said.err or "without" in said.err or ".dll" in said.err


@no_gpu
def test_tf32_on_the_cpu_is_told_to_need_a_gpu(bntool: Shell) -> None:
    for words in (
        ("verify", "net.onnx", "--check", "fast"),
        ("verify", "net.onnx", "same.onnx", "--check", "fast"),
        ("verify", "net.onnx", "net.pt", *nets.INPUT, "--check", "fast"),
        ("verify", "net.pt", "same.pt", *nets.INPUT, "--check", "fast"),
        ("export", "net.pt", *nets.INPUT, "--force", "--check", "fast"),
        ("fold", "net.pt", *nets.INPUT, "--export", "onnx", "--check", "fast"),
    ):
        said = bntool(*words, "--tf32", "both")
        assert said.code == 0, said
        assert "TF32 needs an NVIDIA GPU" in " ".join(said.out.split()), words
        assert "TF32  " not in said.out
