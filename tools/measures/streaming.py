"""Fold a sharded file of weights layer by layer, and say how long it took and how much memory it needed.

    python -m tools.measures.streaming [FOLDER] [--gigabytes 6] [--layer-mib 64]

The weights are convolutions with a BatchNorm each, written layer by layer; afterwards everything is deleted.
Prints one JSON document. The promise: at most the largest layer × 4 + 300 MiB over what torch itself takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bntool.core.plan import Plan
from bntool.core.sites import Edit, FoldSite
from bntool.files.safetensors_files import layout, read_index, write_safetensors
from bntool.files.stored import open_stored
from bntool.surgery.fold_stored import fold_stored

CHANNELS, KERNEL, SHARD_LAYERS, EPS = 1024, 3, 16, 1e-5
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def layer(number: int, inputs: int) -> Iterator[tuple[str, Tensor]]:
    """A convolution without bias and its BatchNorm."""
    random = torch.Generator().manual_seed(number)
    weight = torch.empty(CHANNELS, inputs, KERNEL, KERNEL).uniform_(-0.1, 0.1, generator=random)
    yield f"conv{number}.weight", weight
    for slot in STATISTICS:
        yield f"bn{number}.{slot}", torch.empty(CHANNELS).uniform_(0.5, 1.5, generator=random)


def write(folder: Path, layers: int, inputs: int) -> tuple[Path, Plan]:
    """The file in shards of 16 layers, and the plan that folds it."""
    places: dict[str, str] = {}
    signature: dict[str, tuple[int, ...]] = {}
    for first in range(0, layers, SHARD_LAYERS):
        numbers = range(first, min(first + SHARD_LAYERS, layers))
        shapes = []
        for n in numbers:
            shapes.append((f"conv{n}.weight", "float32", (CHANNELS, inputs, KERNEL, KERNEL)))
            shapes += [(f"bn{n}.{slot}", "float32", (CHANNELS,)) for slot in STATISTICS]
        name = f"in-{first:05}.safetensors"
        tensors = (tensor for n in numbers for _, tensor in layer(n, inputs))
        write_safetensors(folder / name, layout(shapes), {"format": "pt"}, tensors)
        places |= {tensor: name for tensor, _, _ in shapes}
        signature |= {tensor: shape for tensor, _, shape in shapes}
    index = folder / "in.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    sites = tuple(
        FoldSite(f"bn{n}", (f"conv{n}",), ("conv",), (_edit(n), Edit("remove", f"bn{n}")))
        for n in range(layers)
    )
    return index, Plan("fold", sites, (), signature=signature, eps={f"bn{n}": EPS for n in range(layers)})


def _edit(n: int) -> Edit:
    return Edit("scale_output", f"conv{n}", ("bn", f"bn{n}"), f"conv{n}.weight", f"conv{n}.bias", "conv")


def fold(index: Path, plan: Path, output: Path) -> dict[str, float]:
    """In a process of its own, whose memory nothing else has used: seconds, and the peak over the import."""
    torch.zeros(1).double().add(1)  # what torch loads at its first operation
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    started = time.monotonic()
    fold_stored(open_stored(index), Plan.from_json(plan.read_text(encoding="utf-8"))).write(output)
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 1), "peak_over_import_mib": round(_memory("VmHWM") - before, 1)}


def _memory(figure: str) -> float:
    """A figure of this process by Linux, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(figure))


def fold_elsewhere(index: Path, plan: Plan, output: Path) -> dict[str, float]:
    """`fold` in a new process."""
    saved = index.with_name("plan.json")
    saved.write_text(plan.to_json(), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tools.measures.streaming",
        "--fold",
        str(index),
        str(saved),
        str(output),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def check(output: Path, layers: int, inputs: int) -> int:
    """How many layers differ from W·s and t in float64, cast once."""
    headers = dict(read_index(output).headers())
    wrong = 0
    for n in range(layers):
        (_, weight), *rest = layer(n, inputs)
        gamma, beta, mean, variance = (tensor.double() for _, tensor in rest)
        scale = gamma / (variance + EPS).sqrt()
        expected = (weight.double() * scale.reshape(-1, 1, 1, 1)).float()
        bias = (beta - scale * mean).float()
        found = [headers[f"conv{n}.{slot}"].read(f"conv{n}.{slot}") for slot in ("weight", "bias")]
        # rsqrt and 1/sqrt may differ in the last bit of float64, and so by one of float32 after the cast.
        agree = all(
            torch.allclose(a, b, rtol=2e-7, atol=1e-9) for a, b in zip(found, (expected, bias), strict=True)
        )
        wrong += not agree
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="where to write (default: a temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--layer-mib", type=int, default=64)
    parser.add_argument("--fold", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fold:
        print(json.dumps(fold(*map(Path, given.fold))))
        return
    inputs, layers = shape(given.gigabytes, given.layer_mib)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        index, plan = write(folder, layers, inputs)
        size = sum(path.stat().st_size for path in folder.glob("in-*"))
        output = folder / "out.safetensors.index.json"
        figures = {
            "file_mib": size // 2**20,
            "layers": layers,
            "promised_mib": 4 * given.layer_mib + 300,
            **fold_elsewhere(index, plan, output),
            "wrong": check(output, layers, inputs),
        }
    print(json.dumps(figures, indent=1))


def shape(gigabytes: float, layer_mib: int) -> tuple[int, int]:
    """Input channels of a layer of at most `layer_mib`, and how many layers make `gigabytes`."""
    inputs = layer_mib * 2**20 // (CHANNELS * KERNEL**2 * 4)
    return inputs, -(-int(gigabytes * 2**30) // (CHANNELS * inputs * KERNEL**2 * 4))


if __name__ == "__main__":
    main()
