"""What `--rtol` means is said once, and what set a limit is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bntool
from bntool.cli import run
from bntool.core.options import TOLERANCE, CheckOptions
from bntool.core.tolerances import Limit, Tolerance
from bntool.verifying.comparing import compare

ROOT = Path(__file__).resolve().parents[2]


def _words(text: str | None) -> str:
    return " ".join((text or "").replace("\\-", "-").replace("`", "").split())


def test_the_meaning_of_a_tolerance_is_the_same_everywhere() -> None:
    told = {one.name: one.spec.help for one in CheckOptions.options()}
    places = {
        "--atol": told["atol"],
        "--rtol": told["rtol"],
        "compare": compare.__doc__,
        "verify": bntool.verify.__doc__,
        "Tolerance": Tolerance.__doc__,
        "man": (ROOT / "man" / "bntool.1").read_text("utf-8"),
        **{
            name: (ROOT / "docs" / name).read_text("utf-8")
            for name in ("checking.md", "faq.md", "reference/commands.md")
        },
    }
    missing = [name for name, text in places.items() if TOLERANCE not in _words(text)]
    assert not missing
    for name in ("--atol", "--rtol", "man", "reference/commands.md"):  # and none tells another meaning
        assert "relative to the peak" not in _words(places[name]), name


def test_a_tolerance_is_of_the_peak_and_not_element_by_element() -> None:
    expected, off = torch.tensor([[100.0, 0.001]]), torch.tensor([[100.0, 0.5]])
    limits = {"y": Limit(0.0, 0.0)}
    how = {"stage": "verify", "device": "cpu", "provider": "torch"}
    assert compare(
        [{"y": expected}], [{"y": off}], limits, tolerance=Tolerance(rtol=0.005), **how
    ).passed  # 0.5 of 100
    assert not compare(
        [{"y": expected}], [{"y": off}], limits, tolerance=Tolerance(rtol=0.0049), **how
    ).passed
    assert compare([{"y": expected}], [{"y": off}], limits, tolerance=Tolerance(0.1, 0.004), **how).passed
    loose = compare([{"y": expected}], [{"y": off}], limits, tolerance=Tolerance(rtol=2.0), **how)
    assert "y: allowed all of its peak and more, which proves nothing" in loose.detail


def test_verify_tells_what_set_the_limit_and_which_rows_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    bntool.export_onnx(net, torch.zeros(1, 1, 8, 8), "a.onnx")
    assert run(["verify", "a.onnx", "--check", "fast", "--device", "cpu"]) == 0
    assert "limit by    noise floor\n" in capsys.readouterr().out
    assert run(["verify", "a.onnx", "--rtol", "1e-3", "--device", "cpu"]) == 0
    assert "limit by    rtol 0.001\n" in capsys.readouterr().out
    net[0].bias.data.fill_(-90.0)
    bntool.export_onnx(net, torch.zeros(1, 1, 8, 8), "b.onnx")
    assert run(["verify", "b.onnx", "--device", "cpu"]) == 10
    assert "undecided   basic, extended, all: proves nothing on these inputs" in capsys.readouterr().out
