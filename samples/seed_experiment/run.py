"""The experiment that bntool comes from: a small network on MNIST, ten epochs without and with BatchNorm.

    python samples/seed_experiment/run.py --root DATA      # DATA/MNIST/raw holds the four MNIST files

Writes FOLDER/report.md, the published figures beside those of this run, with the plots and `compare.json`.
Stopped and started again it goes on; with more seeds it runs only those that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import bntool
from bntool.cli import run

NETWORK = Path(__file__).resolve().parents[1] / "seed_network.py"
PUBLISHED = (
    ("plain", 1, "test_accuracy", 14.0),
    ("plain", 10, "train_accuracy", 98.75),
    ("plain", 10, "test_accuracy", 98.49),
    ("batchnorm", 1, "test_accuracy", 98.6),
    ("batchnorm", 10, "train_accuracy", 99.92),
    ("batchnorm", 10, "test_accuracy", 99.39),
)
"""Arm, epoch, figure, per cent."""
NAMES = {"plain": "without BatchNorm", "batchnorm": "with BatchNorm"}
PARTS = {"train_accuracy": "training", "test_accuracy": "test"}


def report(document: dict[str, Any]) -> str:
    """The published figures beside ours, and what BatchNorm costs, as Markdown."""
    seeds = sorted({run["seed"] for run in document["runs"]})
    head = (
        f"SGD, rate 0.01, momentum 0.9, batches of 128, {document['settings']['epochs']} epochs, from scratch"
    )
    lines = [
        f"{head}; seeds {', '.join(map(str, seeds))}; torch {document['torch']}.",
        "",
        "| network | epoch | images | published, % | ours, % |",
        "|---|---|---|---|---|",
    ]
    for arm, epoch, key, published in PUBLISHED:
        values = [
            100 * run["history"][epoch - 1][key]
            for run in document["runs"]
            if run["arm"] == arm and len(run["history"]) >= epoch
        ]
        ours = "not run" if not values else f"{statistics.fmean(values):.2f}"
        ours += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {NAMES[arm]} | {epoch} | {PARTS[key]} | {published:g} | {ours} |")
    counts = document["parameters"]
    lines += [
        "",
        "| | without BatchNorm | with BatchNorm | difference |",
        "|---|---|---|---|",
        *(
            f"| {name} | {counts['before'][key]:,} | {counts['after'][key]:,} | {counts['delta'][key]:+,} |"
            for name, key in (("trainable parameters", "trainable"), ("buffers", "buffers"))
        ),
    ]
    return "\n".join(lines) + "\n"


def summaries() -> str:
    """The network's layers without and with BatchNorm, as Markdown."""
    model = bntool.load(f"{NETWORK}:seed_network").module
    example = torch.zeros(1, 1, 28, 28)
    inserted = bntool.insert(model, example, init="default").model
    parts = []
    for name, one in (("Without", model), ("With", inserted)):
        parts.append(f"## {name} BatchNorm\n\n```text\n{bntool.summary(one, example).render(110)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--output", type=Path, default=Path("seed_experiment"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each network (default 5)")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    words = "--data mnist --from-scratch --optimizer sgd --lr 0.01 --momentum 0.9 --batch-size 128".split()
    given = {
        "--root": options.root,
        "--output": options.output,
        "--epochs": options.epochs,
        "--repeats": options.seeds,
    }
    words += [str(word) for pair in given.items() for word in pair]
    code = run(["compare", f"{NETWORK}:seed_network", *words])
    if code:
        return code
    document = json.loads((options.output / "compare.json").read_text(encoding="utf-8"))
    text = f"{report(document)}\n{summaries()}"
    (options.output / "report.md").write_text(text, encoding="utf-8")
    print(f"wrote       {options.output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
