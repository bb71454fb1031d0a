"""`bntool insert model.pt`, `bntool summary`, `bntool fold --export onnx`, typed as they stand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli import nets
from tests.cli.conftest import Shell

SAMPLE = Path(__file__).parents[2] / "samples" / "model.pt"


def _three_lines(bntool: Shell, *first: str, ending: str = ".pt", inserts: int) -> None:
    stem = Path(first[0].rpartition(":")[2]).name.removesuffix(ending)
    inserted = bntool("insert", *first)
    assert inserted.code == 0, inserted
    assert f"{inserts} BatchNorm layers inserted" in inserted.out
    assert f"wrote       {stem}_bn{ending}" in inserted.out

    summary = bntool("summary")
    assert summary.code == 0, summary
    first_line = summary.out.splitlines()[0]
    assert first_line == f"using {stem}_bn{ending}, written by the last bntool insert here"
    assert "since the baseline" in summary.out
    assert summary.out.count("added") == inserts

    folded = bntool("fold", "--export", "onnx")
    assert folded.code == 0, folded
    assert folded.out.startswith(f"using {stem}_bn{ending}, written by the last bntool insert here\n")
    assert f"{inserts} of {inserts} BatchNorm layers folded" in folded.out
    assert "no BatchNormalization" in folded.out
    for stage in ("fold ", "fold float64", "export", "runtime"):
        assert any(line.startswith(stage) and "passed" in line for line in folded.out.splitlines())
    assert Path(f"{stem}_bn_folded.onnx").is_file()
    assert all(said.err == "" for said in (inserted, summary, folded))


def test_on_the_sample(bntool: Shell) -> None:
    shutil.copy(SAMPLE, "model.pt")
    _three_lines(bntool, "model.pt", inserts=7)
    assert nets.counted("model.pt") == (48_884, 0)
    assert nets.counted("model_bn.pt") == (49_320, 443)
    # Nothing was trained in between, so no shift is left and no convolution needs a bias.
    assert nets.counted("model_bn_folded.pt") == (48_884, 0)
    assert Path("model.pt").read_bytes() == SAMPLE.read_bytes()

    after = bntool("summary")
    assert after.out.splitlines()[1] == "compared with model_bn.pt"
    assert after.out.count("removed") == 7


def test_on_a_torchvision_net(bntool: Shell) -> None:
    pytest.importorskip("torchvision")
    _three_lines(bntool, "torchvision:squeezenet1_1", *("--input", "1x3x48x48"), ending=".pt", inserts=26)


def test_on_a_user_class_that_is_allowed_once(bntool: Shell) -> None:
    nets.save(nets.user_model(), "model.pt")
    nets.forget("user_net")
    refused = bntool("insert", "model.pt")
    assert refused.code == 3
    assert "--allow user_net.Net" in refused.err
    assert not Path("model_bn.pt").exists()

    _three_lines(bntool, "model.pt", "--allow", "user_net.Net", *nets.INPUT, inserts=2)
    assert bntool("summary").code == 0


def test_on_weights_through_the_side_file(bntool: Shell) -> None:
    nets.save(nets.user_model().state_dict(), "model.pt")
    nets.forget("user_net")
    _three_lines(bntool, "model.pt", "--arch", "user_net.py:Net", *nets.INPUT, inserts=2)
    assert set(nets.state_of("model_bn_folded.pt")) == set(nets.state_of("model.pt"))

    after = bntool("summary")
    assert after.out.splitlines()[1] == "compared with model_bn.pt"
    assert after.out.count("removed") == 2


def test_on_safetensors(bntool: Shell) -> None:
    save_file(nets.user_model().state_dict(), "w.safetensors", metadata={"note": "kept"})
    nets.forget("user_net")
    _three_lines(
        bntool, "w.safetensors", "--arch", "user_net.py:Net", *nets.INPUT, ending=".safetensors", inserts=2
    )


def test_on_a_checkpoint(bntool: Shell) -> None:
    nets.save({"epoch": 3, "model": nets.user_model().state_dict()}, "model.pt")
    nets.forget("user_net")
    _three_lines(bntool, "model.pt", "--arch", "user_net.py:Net", *nets.INPUT, inserts=2)
    checkpoint = torch.load("model_bn_folded.pt", weights_only=True)
    assert checkpoint["epoch"] == 3


def test_in_processes_of_their_own() -> None:
    """What the shell sees: exit codes, nothing on stderr, no colours, the same files."""
    nets.save(nets.plain(), "model.pt")
    for line in (["insert", "model.pt", *nets.INPUT], ["summary"], ["fold", "--export", "onnx"]):
        words = [sys.executable, "-m", "bntool", *line]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert "\x1b" not in done.stdout
    assert sorted(path.name for path in Path().iterdir()) == [
        "model.pt",
        "model_bn.pt",
        "model_bn.pt.bntool.json",
        "model_bn_folded.onnx",
        "model_bn_folded.pt",
        "model_bn_folded.pt.bntool.json",
    ]


def test_the_demo_is_the_three_lines_on_the_sample(bntool: Shell) -> None:
    said = bntool("demo", "-o", "out")
    assert said.code == 0
    assert [line for line in said.out.splitlines() if line.startswith("$ ")] == [
        "$ bntool insert model.pt",
        "$ bntool summary",
        "$ bntool fold --export onnx",
    ]
    assert Path("out/model_bn_folded.onnx").is_file()
    assert Path.cwd().name == "work"


def test_the_demo_into_a_file_is_refused(bntool: Shell) -> None:
    Path("out").write_text("mine")
    said = bntool("demo", "-o", "out")
    assert said.code == 2
    assert Path("out").read_text() == "mine"
