from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_exits_5_and_writes_nothing():
    page = ROOT / "docs" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py")],
        capture_output=True, text=True, cwd=ROOT, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("no GPU check: ")
    assert (page.read_bytes() if page.exists() else None) == before
