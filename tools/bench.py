"""Measure bntool against its yardsticks in one run, and print ratios: `make bench`.

Times are medians over interleaved repetitions, so that a machine whose speed drifts slows both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import bntool

NETS = ("resnet50", "vgg16_bn", "densenet121")
BARE_SCRIPT = """
import sys, copy, warnings
warnings.simplefilter("ignore")
import torch, numpy, onnxruntime
from torch.fx.experimental.optimization import fuse
model = torch.load(sys.argv[1], weights_only=False).eval()
x = torch.randn(1, 3, 224, 224)
fused = fuse(model)
torch.onnx.export(fused, (x,), sys.argv[2], dynamo=True, verbose=False)
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
with torch.no_grad():
    print(abs(got - model(x).numpy()).max())
"""


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and an affine that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(n, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(n, generator=generator) * 0.1)
    return model.eval()


def medians(functions: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """The median seconds of each, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repetitions + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_of_weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def forward(model: nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        model(image)


def folds(repetitions: int) -> list[dict[str, Any]]:
    from torch.fx.experimental.optimization import fuse

    rows = []
    for name in NETS:
        model = randomise(torchvision.models.get_model(name))
        image = torch.randn(1, 3, 224, 224)
        found = medians(
            {
                "fold": lambda m=model: bntool.fold(m, check="none"),
                "forward": lambda m=model, x=image: forward(m, x),
                "copy": lambda m=model: copy_of_weights(m),
                "fx_fuse": lambda m=model: fuse(m),
            },
            repetitions,
        )
        found["ratio_to_forward_and_copy"] = found["fold"] / (found["forward"] + found["copy"])
        found["ratio_to_fx_fuse"] = found["fold"] / found["fx_fuse"]
        rows.append({"net": name, **found})
    return rows


def command(*words: str, folder: Path | None = None) -> Callable[[], None]:
    def run() -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(folder)} if folder else None
        subprocess.run(words, check=True, capture_output=True, cwd=folder, env=environment)

    return run


def help_page(repetitions: int) -> dict[str, float]:
    found = medians(
        {
            "help": command(sys.executable, "-m", "bntool", "--help"),
            "import_torch": command(sys.executable, "-c", "import torch"),
        },
        repetitions,
    )
    return {**found, "ratio": found["help"] / found["import_torch"]}


def whole_command(repetitions: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(randomise(torchvision.models.resnet50()), folder / "model.pt")
        (folder / "bare.py").write_text(BARE_SCRIPT)
        bntool_words = (sys.executable, "-m", "bntool", "fold", "model.pt", "--export", "onnx", "--force")
        found = medians(
            {
                "bntool": command(*bntool_words, folder=folder),
                "bare_script": command(sys.executable, "bare.py", "model.pt", "bare.onnx", folder=folder),
            },
            repetitions,
        )
    return {**found, "ratio": found["bntool"] / found["bare_script"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(os.cpu_count() or 1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, medians in seconds")
    page = help_page(chosen.repetitions)
    print(
        f"\nbntool --help {page['help']:.3f}, "
        f"import torch {page['import_torch']:.2f}: ratio {page['ratio']:.3f}"
    )
    rows = folds(chosen.repetitions)
    print("\nfold in process, unchecked: observe, plan, apply, a new model")
    print(f"{'net':14}{'fold':>8}{'forward':>9}{'copy':>8}{'ratio':>8}{'fx.fuse':>9}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['net']:14}{row['fold']:8.3f}{row['forward']:9.3f}{row['copy']:8.3f}"
            f"{row['ratio_to_forward_and_copy']:8.2f}{row['fx_fuse']:9.3f}{row['ratio_to_fx_fuse']:8.2f}"
        )
    whole = whole_command(max(2, chosen.repetitions // 2))
    print(
        f"\nfold --export onnx on resnet50 {whole['bntool']:.1f}, a bare script {whole['bare_script']:.1f}: "
        f"ratio {whole['ratio']:.2f}"
    )
    if chosen.json:
        chosen.json.write_text(json.dumps({"help": page, "folds": rows, "whole_command": whole}, indent=1))


if __name__ == "__main__":
    main()
