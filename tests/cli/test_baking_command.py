"""`bntool fold --bake`: the module and its ONNX file with weights that are stored."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Shell

CODE = """from torch import nn
from torch.nn.utils.parametrizations import weight_norm
def make():
    return nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
"""


def test_it_says_what_it_stored_and_what_that_costs(bntool: Shell, folder: Path) -> None:
    (folder / "net.py").write_text(CODE)
    words = ("fold", "net.py:make", "--input", "1x3x16x16", "-o", "out.pt")
    kept = bntool(*words, "--json")
    assert "--bake" in kept.document["skips"][0]["detail"]
    done = bntool(*words, "--export", "onnx", "--bake", "--json")
    assert done.code == 0 and done.document["bn_folded"] == 1
    assert any("made plain (0): training no longer" in note for note in done.document["notes"])
    assert bntool("verify", "out.pt", "out.onnx").code == 0
    assert bntool("fold", "out.onnx", "--bake").code == 2
