"""What takes long to load is loaded by the commands that need it, and by no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

DEAR = ("torch._dynamo", "torch._inductor", "sympy", "onnx", "onnxruntime", "onnxscript", "onnx_ir",
        "pandas", "matplotlib", "plotly", "scipy", "torchvision", "timm")  # fmt: skip

CODE = """
import json, sys
from bntool.cli import run
codes = [run(words.split()) for words in sys.argv[2:]]
print(json.dumps([codes, [name for name in sys.argv[1].split() if name in sys.modules]]))
"""


def test_a_fold_an_insertion_and_a_summary_of_a_module_load_neither_onnx_nor_a_compiler(
    tmp_path: Path,
) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    torch.save(layers.eval(), tmp_path / "m.pt")
    commands = [f"{verb} m.pt --input 1x3x8x8 -q" for verb in ("fold", "insert", "summary")]
    words = [sys.executable, "-c", CODE, " ".join(DEAR), *commands]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert (codes, loaded) == ([0, 0, 0], [])
