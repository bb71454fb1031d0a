"""Measure bntool against its yardsticks in one run, and write docs/benchmarks.md: `make bench`.

Times are medians over interleaved repetitions, and a ratio is the median of the ratios round by round, so
that a machine whose speed drifts slows both sides. Calls and forwards run on `--threads`: on one they are
measured in processor time, which other work on the machine moves less than the clock, on more by the clock.
Commands are measured by the clock.

What was measured is kept in build/bench.json, row by row: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from bench_calls import CALLS, FAILS, PEERS, SLOW, own_calls, peer_calls, quiet, scratch, tried
from bench_nets import NETS, net, randomise, usual_input
from bench_page import page
from bench_planning import growths
from torch import nn

import bntool

ROOT = Path(__file__).resolve().parents[2]
PAGE, KEPT = ROOT / "docs" / "benchmarks.md", ROOT / "build" / "bench.json"
SCALED = {
    "image, side": [("torchvision:resnet50", (1, 3, side, side)) for side in (64, 128, 224, 448)],
    "batch": [("torchvision:resnet50", (batch, 3, 224, 224)) for batch in (1, 2, 4, 8)],
    "depth": [(f"torchvision:resnet{depth}", (1, 3, 224, 224)) for depth in (18, 34, 50, 101, 152)],
}
"""What is made larger, and the nets and inputs that show it."""
HEAVY = ("torchvision:resnet50", "torchvision:vgg16_bn", "torchvision:vit_b_16", "2,000 small modules")
"""Nets whose memory is measured, each in a process of its own."""

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

Times = dict[str, list[float]]


def rounds(
    functions: dict[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float],
    *,
    warm: bool = True,
) -> Times:
    """The seconds of each, run in turn, after a round to warm up; of slow ones once in all."""
    times: Times = {name: [] for name in functions}
    for round_ in range(repetitions + warm):
        for name, function in functions.items():
            if name in SLOW and round_ != repetitions + warm - 1:
                continue
            start = clock()
            with quiet():
                function()
            if round_ or not warm:
                times[name].append(clock() - start)
    return times


def clock() -> Callable[[], float]:
    """What tells the time: on one thread that of the processor, on several it would count those that wait."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Times, first: str, *others: str) -> float:
    """The median over the last rounds of one time over the sum of others."""
    rows = zip(*(reversed(times[name]) for name in (first, *others)), strict=False)
    return statistics.median(a / sum(b) for a, *b in rows)


def copy_of_weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def forward(model: nn.Module, image: Any) -> None:
    with torch.no_grad():
        model(image)


def called(name: str, repetitions: int) -> dict[str, Any]:
    """What a call costs, to one forward and one copy of the weights."""
    model = net(name)
    image = usual_input(model)
    with scratch() as folder:
        found = {**own_calls(model, (image,), folder), **peer_calls(model, (image,), folder)}
        # a batch of one image gives some layers no variance to calibrate, and not all can be captured
        may_fail = (*PEERS, "calibrate", "export")
        calls = {key: tried(call) if key in may_fail else call for key, call in found.items()}
        functions: dict[str, Callable[[], Any]] = {
            "forward": lambda: forward(model, image),
            "copy": lambda: copy_of_weights(model),
            **{key: call for key, call in calls.items() if not isinstance(call, str)},
        }
        times = rounds(functions, repetitions, clock())
    unit = ("forward", "copy")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
        **{key: call for key, call in calls.items() if isinstance(call, str)},
        **medians({key: times[key] for key in unit}),
        **{key: ratio(times, key, *unit) for key in times if key not in unit},
    }


def scaled(name: str, shape: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    """A proved fold, and an unchecked one, on a larger input or net."""
    model, image = net(name), torch.randn(shape)
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, image),
        "copy": lambda: copy_of_weights(model),
        "unchecked": lambda: bntool.fold(model, image, check="none"),
        "proved": lambda: bntool.fold(model, image),
    }
    times = rounds(functions, repetitions, clock())
    found = {key: ratio(times, key, "forward", "copy") for key in ("unchecked", "proved")}
    return {"net": name, "shape": "x".join(map(str, shape)), **medians(times), "ratios": found}


def memory(name: str) -> dict[str, Any]:
    """The most that a process holds beyond the model: in a forward, and in folds, in bytes."""
    found: dict[str, Any] = {}
    for what in ("forward", "unchecked", "proved"):  # a process keeps what the call before has let go
        words = [sys.executable, str(Path(__file__).with_name("bench_memory.py")), name, what]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def commands(repetitions: int) -> dict[str, dict[str, float]]:
    """Whole commands, by the clock, beside what does the same without bntool."""
    with scratch() as folder:
        torch.save(randomise(torchvision.models.resnet50()), folder / "model.pt")
        (folder / "bare.py").write_text(BARE_SCRIPT)
        fold = (sys.executable, "-m", "bntool", "fold", "model.pt", "--export", "onnx", "--force")
        functions = {
            "bare": _command(folder, sys.executable, "bare.py", "model.pt", "bare.onnx"),
            "full check": _command(folder, *fold),
            "fast check": _command(folder, *fold, "--check", "fast"),
            "no check": _command(folder, *fold, "--check", "none"),
            "help": _command(folder, sys.executable, "-m", "bntool", "--help"),
            "torch": _command(folder, sys.executable, "-c", "import torch"),
        }
        times = rounds(functions, repetitions, time.perf_counter)
    beside = {"full check": "bare", "fast check": "bare", "no check": "bare", "help": "torch"}
    middle = medians(times)
    return {
        name: {"seconds": middle[name], "yardstick": middle[other], "ratio": ratio(times, name, other)}
        for name, other in beside.items()
    }


def _command(folder: Path, *words: str) -> Callable[[], None]:
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    return lambda: (
        subprocess.run(words, check=True, capture_output=True, cwd=folder, env=environment) and None
    )


def pieces(repetitions: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Every row of the page: its part, its name, and what measures it."""
    for name in NETS:
        yield "calls", name, lambda name=name: called(name, repetitions)
    for what, rows in SCALED.items():
        for name, shape in rows:
            key = f"{what}: {name} {'x'.join(map(str, shape))}"
            yield what, key, lambda name=name, shape=shape: scaled(name, shape, repetitions)
    for name in HEAVY:
        yield "memory", name, lambda name=name: memory(name)
    yield "growth", "all", lambda: [growth.to_dict() for growth in growths()]
    yield "commands", "all", lambda: commands(repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure all of it anew")
    parser.add_argument("--only", default="", help='rows that begin so: "memory", "calls: timm:"')
    parser.add_argument("--rows", type=int, default=1000, help="measure so many at most, then write the page")
    parser.add_argument("--threads", type=int, default=1, help="of calls and forwards")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(chosen.threads)
    kept: dict[str, Any] = {} if chosen.fresh or not KEPT.exists() else json.loads(KEPT.read_text())
    if kept.setdefault("threads", chosen.threads) != chosen.threads:
        parser.error(f"what is kept was measured on --threads {kept['threads']}: add --fresh")
    kept.setdefault("loads", [])
    KEPT.parent.mkdir(exist_ok=True)
    for part, name, measure in pieces(chosen.repetitions):
        if name in kept.get(part, {}) or not f"{part}: {name}".startswith(chosen.only):
            continue
        if not chosen.rows:
            break
        chosen.rows -= 1
        kept["loads"].append(round(os.getloadavg()[0], 1))
        kept.setdefault(part, {})[name] = row = measure()
        KEPT.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        shown = [f"{key} {row[key]:.2f}" for key in CALLS if part == "calls" and row[key] != FAILS]
        print(f"{part}: {name}  {'  '.join(shown)}", flush=True)
    PAGE.write_text(page(kept), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
