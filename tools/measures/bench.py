"""Measure bntool against its yardsticks in one run, and write docs/benchmarks.md: `make bench`.

Times are medians over interleaved repetitions, and a ratio is the median of the ratios round by round, so
that a machine whose speed drifts slows both sides. Folds and forwards run on one thread and are measured in
processor time, which other work on the machine moves less than the clock; commands by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from bench_page import CALLS, page, with_calls
from bench_planning import growths
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse

import bntool
from bntool.files.references import build

NETS = """torchvision:resnet50 torchvision:vgg16_bn torchvision:resnet18 torchvision:wide_resnet50_2
timm:repvgg_a2 timm:tf_efficientnet_b3 torchvision:densenet121 torchvision:efficientnet_b0
torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x1_0
timm:regnetx_002 timm:ghostnet_100 timm:levit_128s""".split()
CALLED = """torchvision:vgg16_bn torchvision:resnet50 timm:repvgg_a2 timm:cspdarknet53 torchvision:r3d_18
torchvision:resnet18 torchvision:densenet121 timm:levit_128s torchvision:efficientnet_b0 timm:ghostnet_100
torchvision:mobilenet_v2 torchvision:ssdlite320_mobilenet_v3_large timm:regnetx_002
torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x1_0 timm:hrnet_w18_small""".split()
"""Nets on which whole calls are timed: a backbone of YOLO's, one over volumes, one of detection too."""
VOLUME = (1, 3, 16, 112, 112)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"

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


def rounds(
    functions: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """The seconds of each, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repetitions + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if round_:
                times[name].append(clock() - start)
    return times


def compared(
    functions: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median of each, and the `ratio` of the first to the sum of the others."""
    times = rounds(functions, repetitions, clock)
    first, *others = times
    return {**medians(times), "ratio": ratio(times, first, *others)}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: dict[str, list[float]], first: str, *others: str) -> float:
    """The median over the rounds of one time over the sum of others."""
    rows = zip(times[first], *(times[name] for name in others), strict=True)
    return statistics.median(a / sum(b) for a, *b in rows)


def copy_of_weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def forward(model: nn.Module, image: Any) -> None:
    with torch.no_grad():
        model(image)


def usual_input(model: nn.Module) -> Any:
    """One image of the size the model is made for: what its configuration records, else 3x224x224; a clip for
    one over volumes, a list of one image for one of detection.
    """
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return torch.randn(VOLUME)
    if hasattr(model, "roi_heads") or hasattr(model, "anchor_generator"):
        return [torch.randn(3, 320, 320)]
    recorded = getattr(model, "pretrained_cfg", None) or {}
    return torch.randn(1, *recorded.get("input_size", (3, 224, 224)))


def folds(repetitions: int) -> Iterator[dict[str, Any]]:
    """One row for each net, as it is done."""
    for name in NETS:
        model = randomise(build(name).model)
        image = usual_input(model)
        functions = {
            "fold": lambda m=model: bntool.fold(m, check="none"),
            "forward": lambda m=model, x=image: forward(m, x),
            "copy": lambda m=model: copy_of_weights(m),
        }
        with contextlib.suppress(Exception):  # torch.fx cannot trace every model
            fuse(model)
            functions["fx"] = lambda m=model: fuse(m)
        if any(hasattr(module, "reparameterize") for module in model.modules()):
            functions["own"] = lambda m=model: reparameterize_model(m)
        times = rounds(functions, repetitions, time.process_time)
        yield {
            "net": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "size": "x".join(map(str, image.shape)),
            **medians(times),
            "ratio": ratio(times, "fold", "forward", "copy"),
            "to_fx": ratio(times, "fold", "fx") if "fx" in times else None,
            "own_ratio": ratio(times, "own", "forward", "copy") if "own" in times else None,
        }


def calls(repetitions: int) -> Iterator[dict[str, Any]]:
    """One row for each net: what a call costs, to one forward and one copy of the weights."""
    for name in CALLED:
        model = randomise(build(name).model)
        image = usual_input(model)
        given = (image,)
        functions: dict[str, Callable[[], Any]] = {
            "unchecked": lambda m=model, x=given: bntool.fold(m, x, check="none"),
            "proved": lambda m=model, x=given: bntool.fold(m, x),
            "full": lambda m=model, x=given: bntool.fold(m, x, check="full"),
            "insert": lambda m=model, x=given: bntool.insert(m, x),
            "summary": lambda m=model, x=given: bntool.summary(m, x),
            "forward": lambda m=model, x=image: forward(m, x),
            "copy": lambda m=model: copy_of_weights(m),
        }
        with contextlib.suppress(Exception):  # torch.fx cannot trace every model
            fuse(model)
            functions["fx fuse"] = lambda m=model: fuse(m)
        times = rounds(functions, repetitions, time.process_time)
        unit = {"forward", "copy"}
        yield {
            "net": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            **medians({key: times[key] for key in unit}),
            **{key: ratio(times, key, *unit) for key in times if key not in unit},
        }


def command(*words: str, folder: Path | None = None) -> Callable[[], None]:
    def run() -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(folder)} if folder else None
        subprocess.run(words, check=True, capture_output=True, cwd=folder, env=environment)

    return run


def help_page(repetitions: int) -> dict[str, float]:
    return compared(
        {
            "bntool": command(sys.executable, "-m", "bntool", "--help"),
            "yardstick": command(sys.executable, "-c", "import torch"),
        },
        repetitions,
    )


def whole_command(repetitions: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(randomise(torchvision.models.resnet50()), folder / "model.pt")
        (folder / "bare.py").write_text(BARE_SCRIPT)
        bntool_words = (sys.executable, "-m", "bntool", "fold", "model.pt", "--export", "onnx", "--force")
        return compared(
            {
                "bntool": command(*bntool_words, folder=folder),
                "yardstick": command(sys.executable, "bare.py", "model.pt", "bare.onnx", folder=folder),
            },
            repetitions,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument(
        "--only", choices=("folds", "calls", "growth"), help="these figures alone; calls go into the page"
    )
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, grown, called = [], [], []
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    if chosen.only in (None, "calls"):
        for row in calls(max(2, chosen.repetitions // 3)):
            figures = (f"{key} {row[key]:.2f}" for key in CALLS if key in row)
            print(f"{row['net']:44}{'  '.join(figures)}", flush=True)
            called.append(row)
        if chosen.only:
            PAGE.write_text(with_calls(PAGE.read_text(encoding="utf-8"), called), encoding="utf-8")
    if chosen.only in (None, "folds"):
        for row in folds(chosen.repetitions):
            print(f"{row['net']:34}{1000 * row['fold']:7.1f} ms{row['ratio']:7.2f}", flush=True)
            rows.append(row)
    if chosen.only in (None, "growth"):
        for growth in growths():
            print(f"{growth.net:34}{1e6 * growth.plan[-1] / growth.ops[-1]:7.1f} us{growth.exponent:7.2f}")
            grown.append(growth)
    if chosen.only is None:
        help_, whole = help_page(chosen.repetitions), whole_command(max(2, chosen.repetitions // 3))
        PAGE.write_text(page(load, rows, called, grown, help_, whole), encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
