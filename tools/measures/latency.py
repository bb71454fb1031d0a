"""Time folded networks against the same architectures built without BatchNorm: `make latency`.

What a fold promises is that the BatchNorms cost nothing any more. So the folded network, as ONNX and in
torch, is timed beside one of the same shapes that never had a BatchNorm, and beside itself unfolded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

import bntool
from bntool.core.latencies import Benchmark
from bntool.graph.inputs import Inputs
from bntool.results.latency import latency_text
from bntool.runtime.benchmarking import Candidate, benchmark

NETS = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2")
PAIRS = (
    ("torch before", "torch folded"),
    ("torch folded", "torch without"),
    ("ONNX before", "ONNX folded"),
    ("ONNX folded", "ONNX without"),
)


def without_batch_norm(name: str) -> nn.Module:
    """The architecture as one would build it without BatchNorm: no norm, and convolutions with a bias."""
    model = torchvision.models.get_model(name).eval()
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, child_name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.register_parameter("bias", nn.Parameter(torch.zeros(child.out_channels)))
    return model


def measured(name: str, side: int, batches: tuple[int, ...], rounds: int) -> Benchmark:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    example = Inputs((torch.zeros(1, 3, side, side),))
    versions = {
        "before": model,
        "folded": bntool.fold(model, example).model,
        "without": without_batch_norm(name),
    }
    with tempfile.TemporaryDirectory() as folder:
        candidates = [Candidate(f"torch {kind}", version) for kind, version in versions.items()]
        for kind, version in versions.items():
            path = bntool.export_onnx(version, example, Path(folder) / f"{kind}.onnx")
            candidates.append(Candidate(f"ONNX {kind}", path))
        inputs_of = example.batched()
        return benchmark(candidates, inputs_of, batches=batches, rounds=rounds, seconds=60, pairs=PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", default=NETS)
    parser.add_argument("--side", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", default="1", help="batch sizes, by commas")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    batches = tuple(int(n) for n in chosen.batches.split(","))
    found = {}
    for name in chosen.nets:
        result = measured(name, chosen.side, batches, chosen.rounds)
        print(f"\n{name}\n{latency_text(result)}")
        found[name] = result.to_dict()
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
