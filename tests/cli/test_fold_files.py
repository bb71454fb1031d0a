"""Options of `fold` on ONNX files and exported programs: honoured, or refused in so many words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import broken
from tests.cli import nets
from tests.cli.conftest import Shell
from tests.exports import export_onnx

IMAGE = torch.zeros(1, 3, 12, 12)


@pytest.fixture
def onnx_file(folder: Path) -> None:
    export_onnx(broken.network(), (IMAGE,), folder / "net.onnx")


@pytest.fixture
def program_file(folder: Path) -> None:
    torch.export.save(torch.export.export(broken.network(), (IMAGE,)), folder / "net.pt2")


@pytest.mark.usefixtures("onnx_file")
@pytest.mark.parametrize(
    "words",
    ["--opset 17", "--ir-version 8", "--static-batch", "--dynamic 0,2", "--external-data always", "--keep-io",
     "--exporter legacy", "--keep-unverified", "--tf32 both", "--export onnx", "--dtype fp16"],
)  # fmt: skip
def test_an_onnx_file_is_not_exported_again(refused: Shell, words: str) -> None:
    flag = words.split(maxsplit=1)[0]
    refused("fold", "net.onnx", *words.split(), code=2, says=f"{flag} is not for an ONNX file")
    assert [p.name for p in Path().iterdir()] == ["net.onnx"]


@pytest.mark.usefixtures("onnx_file")
def test_an_onnx_file_is_timed_before_and_after(bntool: Shell) -> None:
    said = bntool("fold", "net.onnx", "--bench", "--rounds", "11", "--batch-sizes", "1", "--json")
    assert said.code == 0, said
    assert [row["name"] for row in said.document["latency"]["rows"]] == ["before", "folded"]


@pytest.mark.usefixtures("onnx_file")
@pytest.mark.parametrize("flag", ["--atol", "--rtol"])
def test_the_tolerances_of_an_onnx_file_are_honoured(bntool: Shell, flag: str) -> None:
    """Nothing that was folded is within zero of what it was."""
    none = bntool("fold", "net.onnx", flag, "0")
    assert none.code == 1, none
    assert [p.name for p in Path().iterdir()] == ["net.onnx"]
    assert bntool("fold", "net.onnx", flag, "1").code == 0


@pytest.mark.usefixtures("program_file")
def test_a_program_is_timed_and_its_tolerances_are_honoured(bntool: Shell, refused: Shell) -> None:
    said = bntool("fold", "net.pt2", "--bench", "--rounds", "11", "--batch-sizes", "1", "--json")
    assert said.code == 0, said
    assert [row["name"] for row in said.document["latency"]["rows"]] == ["torch before", "torch folded"]
    # Nothing is within zero of what was folded, except what was not folded at all: so nothing stands up.
    none = bntool("fold", "net.pt2", "--atol", "0", "--force")
    assert none.code != 0, none
    assert bntool("fold", "net.pt2", "--atol", "1", "--force").code == 0
    refused(
        "fold", "net.pt2", "--force", "--keep-unverified", code=2, says="--keep-unverified is for the ONNX"
    )


def _spoil(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Have every file that is written hold one weight that is off."""
    import importlib

    module = importlib.import_module(where)
    honest = module.save_onnx

    def off(*args, **options):
        path, data = honest(*args, **options)
        broken.broken_file(path, "one weight off by 1e-3", path)
        return path, data

    monkeypatch.setattr(module, "save_onnx", off)


@pytest.mark.usefixtures("onnx_file")
def test_a_folded_onnx_file_that_differs_is_blamed_and_leaves_a_repro(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, "bntool.subjects.onnx")
    said = bntool("fold", "net.onnx", "--repro", "repro")
    assert said.code == 1, said
    assert "first differs at" in said.out
    assert sorted(p.name for p in Path().iterdir()) == ["net.onnx", "repro"]
    ran = subprocess.run([sys.executable, "repro/run.py"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.usefixtures("program_file")
def test_the_export_of_a_program_is_blamed_and_kept_when_asked(
    bntool: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bntool.pipeline import serving

    honest = serving.fold_exported

    def off(export, *args, **options):
        export = honest(export, *args, **options)
        broken.broken_file(export.path, "NaN in one output", export.path)
        return export

    monkeypatch.setitem(broken.FILES, "NaN in one output", (_first_nan, ""))
    monkeypatch.setattr(serving, "fold_exported", off)
    said = bntool("fold", "net.pt2", "--export", "onnx", "--keep-unverified")
    assert said.code == 1, said
    assert "net_folded.unverified.onnx: do not serve it" in said.err
    assert sorted(p.name for p in Path().iterdir()) == ["net.pt2", "net_folded.unverified.onnx"]


def _first_nan(file) -> None:
    import numpy as np
    from onnx import numpy_helper

    tensor = next(t for t in file.graph.initializer if t.data_type == 1)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def test_a_fold_of_a_module_that_differs_is_blamed(bntool: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from bntool.subjects import module_folding

    honest = module_folding.PlannedFold.carry_out

    def off(self):
        folded, _ = honest(self)
        return broken.broken_module(folded, "transposed weight"), {}

    nets.save(broken.network(), "net.pt")
    monkeypatch.setattr(module_folding.PlannedFold, "carry_out", off)
    said = bntool("fold", "net.pt", *nets.INPUT, "--repro", "repro")
    assert said.code == 1, said
    assert "first differs at square (Linear), fold stage" in said.out
    ran = subprocess.run([sys.executable, "repro/run.py"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")
