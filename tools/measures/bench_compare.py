"""What `bntool compare` costs beside a bare PyTorch loop that does the same training, in one run.

    python tools/measures/bench_compare.py --root DATA        # DATA/MNIST/raw holds the four MNIST files

Both train the sample network, with and without BatchNorm, on the same batches, and test it after; in turn, so
that a machine whose speed drifts slows both. CPU time is printed too, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import bntool
from bntool.experiment.comparison import compare_training
from bntool.experiment.datasets import open_dataset
from bntool.experiment.samples import Data, Held
from bntool.experiment.settings import Settings, seed_for

NETWORK = Path(__file__).resolve().parents[2] / "samples" / "seed_network.py"


def bare(model: nn.Module, data: Data, settings: Settings) -> None:
    """The loop without bntool: the same order, loss, optimizer, figures of the training and the test."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lrs[0], momentum=settings.momentum)
    train, test = data.train, data.test
    assert isinstance(train, Held) and isinstance(test, Held)
    model.train()
    generator = torch.Generator().manual_seed(seed_for(0, "order", 0))
    total = hits = 0.0
    for part in torch.randperm(len(train), generator=generator).split(settings.batch_size):
        inputs, labels = train.inputs[part], train.labels[part]
        optimizer.zero_grad()
        output = model(inputs)
        loss = F.cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        hits += int((output.argmax(1) == labels).sum())
    model.eval()
    with torch.no_grad():
        for inputs, labels in zip(
            test.inputs.split(settings.batch_size), test.labels.split(settings.batch_size), strict=True
        ):
            hits += int((model(inputs).argmax(1) == labels).sum())


def part_of(data: Data, samples: int) -> Data:
    """The first samples, and a sixth as many for the test."""
    cut = [
        Held(held.inputs[:n], held.labels[:n])
        for held, n in zip((data.train, data.test), (samples, samples // 6), strict=True)
        if isinstance(held, Held)
    ]
    return dataclasses.replace(data, train=cut[0], test=cut[1], labels=(cut[0].labels, cut[1].labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=6000, help="training images of each round")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    model = bntool.load(f"{NETWORK}:seed_network").module
    data = part_of(open_dataset("mnist", root=chosen.root), chosen.samples)
    settings = Settings(epochs=1, from_scratch=True)
    quiet = dataclasses.replace(settings, watch_every=0)
    often = dataclasses.replace(settings, watch_every=10)
    normed = bntool.insert(model, data.example().args[0], init="default").model

    def compared(which: Settings) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            compare_training(model, data, which, Path(folder) / "c")

    def plainly() -> None:
        for one in (model, normed):
            bare(one, data, settings)

    rounds: dict[str, list[tuple[float, float]]] = {}
    for number in range(chosen.rounds + 1):
        for name, call in (
            ("bare loop", plainly),
            ("compare", lambda: compared(settings)),
            ("unwatched", lambda: compared(quiet)),
            ("every 10th", lambda: compared(often)),
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if number:
                taken = time.perf_counter() - wall, time.process_time() - cpu
                rounds.setdefault(name, []).append(taken)
    walls, cpus = (
        {name: statistics.median(times[i] for times in found) for name, found in rounds.items()}
        for i in (0, 1)
    )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {chosen.samples} images, medians")
    print(f"{'':12}{'seconds':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}")
    for name in rounds:
        print(
            f"{name:12}{walls[name]:9.2f}{walls[name] / walls['bare loop']:7.3f}"
            f"{cpus[name]:9.2f}{cpus[name] / cpus['bare loop']:7.3f}"
        )


if __name__ == "__main__":
    main()
