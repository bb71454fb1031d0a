"""Parts of labelled data: which to train and to test on, what is held out, and images as samples."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bntool.core.errors import UsageError
from bntool.data.images import Picture, Preparation, image_batch
from bntool.experiment.samples import Data, Held, Samples, Streamed, subset

_HELD_OUT = 5
"""One sample in so many is held out for the test where the data has no part for it."""
_IN_MEMORY = 1 << 29
"""Bytes up to which images from files are decoded once and kept."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images by number, with the number of their class."""

    files: Sequence[Picture]
    targets: list[int]
    preparation: Preparation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return image_batch([self.files[number]], self.preparation)[0], self.targets[number]


def two_parts(split: str, where: str) -> list[str]:
    """The two names in `--split`. Raises `UsageError` for any other number of them."""
    names = split.split(",")
    if len(names) != 2 or not all(names):
        raise UsageError(
            f"--split {split} does not name two parts",
            where=where,
            next_step="name the one to train on and the one to test on: --split train,val",
        )
    return names


def decoded(images: Images) -> Samples:
    """The images decoded once where they are small; decoded for each batch by workers where not."""
    channels, height, width = images.preparation.size
    if len(images) * channels * height * width * 4 > _IN_MEMORY:
        return Streamed(images, workers=min(4, os.cpu_count() or 1))
    cuts = range(0, len(images), 64)
    inputs = torch.cat([image_batch(images.files[i : i + 64], images.preparation) for i in cuts])
    return Held(inputs, torch.tensor(images.targets, dtype=torch.int64))


def held_out_of(length: int, seed: int, where: Path) -> tuple[Tensor, Tensor]:
    """Sample numbers for training and, a fifth of them, for the test, in their order."""
    held_out = length // _HELD_OUT
    if not held_out:
        raise UsageError(
            f"{length} samples are too few to hold some out for the test",
            where=str(where),
            next_step="give the test data of its own (test/, or x_test and y_test)",
        )
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def of_parts(
    samples: list[Samples], labels: list[Tensor], classes: int, path: Path, notes: Sequence[str], seed: int
) -> Data:
    """Data to train and to test on; of one part a fifth is held out for the test."""
    said = [note for note in notes if note]
    if len(samples) == 1:
        indices = held_out_of(len(samples[0]), seed, path)
        samples, labels = [subset(samples[0], index) for index in indices], [labels[0][i] for i in indices]
        said.append(split_note(seed))
    return Data(samples[0], samples[1], classes, str(path), (labels[0], labels[1]), tuple(said))


def split_note(seed: int) -> str:
    """That a part is held out, in words."""
    return f"no test part in the data: a fifth is held out (seed {seed})"
