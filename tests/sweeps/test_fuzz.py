"""A sample of `make fuzz`, and that the fuzzer itself would notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="every batch of files is opened in a fork")


def test_damaged_files_of_every_format() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tools.sweeps.fuzz", "--cases", "400"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "400 damaged files: 0 failures" in ran.stdout
    # Some damage is refused and some does no harm, in every format that bntool loads.
    for name in ("weights.pt", "old.pt", "weights.safetensors", "outside.bin"):
        (line,) = (line for line in ran.stdout.splitlines() if line.startswith(name + " "))
        assert "refused" in line
        assert "loaded" in line


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import tools.sweeps.fuzz as fuzz
fuzz.SECONDS = 1
good = lambda: "loaded"
jobs = [good, lambda: os.kill(os.getpid(), signal.SIGSEGV), good, lambda: time.sleep(9), good]
print(fuzz._batch(jobs))
folder = Path(sys.argv[1])
files = fuzz.samples(folder)
content = files["weights.safetensors"].read_bytes()
at = len(content) - 9
flipped = content[:at] + bytes([content[at] ^ 64]) + content[at + 1:]
(folder / "net.py").write_text(
    "from torch import nn\\ndef make():\\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), "
    "nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))")
arch = f"{folder / 'net.py'}:make"
whole = fuzz.opened(files["weights.safetensors"], arch)
fuzz.CHECKED = {"weights.safetensors"}
print(fuzz._try("weights.safetensors", files["weights.safetensors"], flipped, arch, whole))
fuzz.opened = lambda path, arch: {}[path.name]
print(fuzz._try("module.pt", files["module.pt"], content, arch, whole))
"""


def test_the_fuzzer_notices_a_crash_a_hang_a_traceback_and_other_weights(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    batch, other, traceback = ran.stdout.splitlines()[-3:]
    died = f"FAILED: it died with {-signal.SIGSEGV}"
    assert batch == str(["loaded", died, "loaded", "FAILED: it hung", "loaded"])
    assert other == "FAILED: other weights came out, and no checksum told"
    assert traceback.startswith("FAILED: KeyError")
