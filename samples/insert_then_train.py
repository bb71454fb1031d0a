"""Insert BatchNorm into the trained sample network, compare its accuracy, and train both on.

    python samples/insert_then_train.py --root DATA      # DATA/MNIST/raw holds the four MNIST files

Same seed, same batches and same optimizer for all. Deterministic on one machine.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_seed import accuracy, mnist_tensors, train_epoch

import bntool

MODEL = Path(__file__).with_name("model.pt")
MEASURED = 10_000
"""Training images that calibration reads."""

Data = tuple[Tensor, Tensor]


def versions(images: Tensor) -> dict[str, nn.Module]:
    """The sample network as it is, and after both kinds of insertion that keep what it computes."""
    model = bntool.load(str(MODEL)).model
    batches = list(images[:MEASURED].split(1000))
    return {
        "as it is": copy.deepcopy(model),
        "insert": bntool.insert(model, images[:1]).model,
        "insert --init calibrate": bntool.insert(model, images[:1], init="calibrate", data=batches).model,
    }


def trained_on(model: nn.Module, data: Data, held_out: Data, epochs: int, seed: int) -> list[float]:
    """The test accuracy before, and after each further epoch."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    figures = [accuracy(model, *held_out)]
    for epoch in range(1, epochs + 1):
        train_epoch(model, optimizer, *data, order, f"epoch {epoch}/{epochs}")
        figures.append(accuracy(model, *held_out))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data, held_out = (mnist_tensors(options.root, train=train) for train in (True, False))
    count = len(held_out[1])
    table = Table("network", "before", *(f"epoch {i + 1}" for i in range(options.epochs)))
    table.title = f"test images recognised, of {count:,}"
    for name, model in versions(data[0]).items():
        figures = trained_on(model, data, held_out, options.epochs, options.seed)
        table.add_row(name, *(f"{round(figure * count):,}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
