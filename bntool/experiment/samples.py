"""Labelled samples by number: kept in memory, or made when they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bntool.core.errors import UsageError
from bntool.data.records import LABELS
from bntool.graph.inputs import Inputs


class Samples(Protocol):
    """Labelled samples by number."""

    def __len__(self) -> int: ...

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (N, …) and labels (N,) for each vector of sample numbers."""

    def placed(self, device: torch.device) -> Samples:
        """The same samples where they are trained on, as far as they fit there."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Samples that are kept in memory: inputs (N, …), labels (N,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            index = part.to(self.labels.device)
            yield self.inputs[index], self.labels[index]

    def placed(self, device: torch.device) -> Held:
        return Held(self.inputs.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Samples that a dataset makes when they are asked for.

    Workers only where a sample is the same every time: one that draws random numbers must draw them here,
    or a run that goes on after a stop would see others.
    """

    dataset: Any
    collate: Any = None
    workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),  # else it takes a number from the global one
        )
        for item in loader:
            yield pair_of(item, type(self.dataset).__name__)

    def placed(self, device: torch.device) -> Streamed:  # noqa: ARG002 - batches are moved one by one
        return self


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and test samples, how many classes there are, and where they come from."""

    train: Samples
    test: Samples
    classes: int
    origin: str
    labels: tuple[Tensor, Tensor] | None = None
    notes: tuple[str, ...] = ()

    def example(self) -> Inputs:
        """The first two samples as model inputs: one has no variance."""
        inputs, _ = next(self.train.batches([torch.arange(min(2, len(self.train)))]))
        return Inputs((inputs,), origin=f"the first samples of {self.origin}")

    def inputs_for(self, model: nn.Module) -> Tensor:
        """Those as the model takes them: where it is, in its type."""
        parameter = next(model.parameters())
        (inputs,) = self.example().args
        moved: Tensor = inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else None)
        return moved

    def fingerprint(self) -> str:
        """Tells apart data that a run cannot go on with: sizes, labels and the first samples."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)}".encode())
        for tensor in (*(self.labels or ()), *self.example().args):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def pair_of(item: Any, where: str) -> tuple[Tensor, Tensor]:
    """A batch as inputs and labels: a pair, or a mapping of both. Raises `UsageError` for anything else."""
    if isinstance(item, Mapping) and len(item) == 2 and len(named := [n for n in item if n in LABELS]) == 1:
        item = next(value for name, value in item.items() if name != named[0]), item[named[0]]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UsageError(
            f"a batch is a {type(item).__name__}", where=where, next_step="give (inputs, labels) pairs"
        )
    inputs = item[0] if isinstance(item[0], Tensor) else torch.as_tensor(np.asarray(item[0]))
    return inputs, labels_of(item[1], where)


def labels_of(values: Any, where: str) -> Tensor:
    """Labels as int64 (N,). Raises `UsageError` for what are no numbers of classes."""
    labels = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype is torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise UsageError(
            f"the labels are {kind} of shape {list(labels.shape)}",
            where=where,
            next_step="give one whole number for each sample: the number of its class, from 0",
        )
    return labels.to(torch.int64)


def held(inputs: Any, labels: Any, where: str) -> Held:
    """Arrays or tensors as samples in memory. Raises `UsageError` for what no training can read."""
    try:
        tensor = inputs if isinstance(inputs, Tensor) else torch.from_numpy(np.asarray(inputs))
    except TypeError as error:
        raise UsageError(f"the inputs cannot be read: {error}", where=where) from error
    found = Held(tensor.detach(), labels_of(labels, where))
    if len(tensor) != len(found.labels):
        raise UsageError(
            f"there are {len(tensor)} samples and {len(found.labels)} labels",
            where=where,
            next_step="give one label for each sample",
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UsageError("the data holds NaN or infinite values", where=where, next_step="clean the data")
    return found


def held_data(train: Held, test: Held, origin: str, *notes: str) -> Data:
    """Data of two parts in memory; the classes are those of the training."""
    classes = int(train.labels.max()) + 1 if len(train) else 0
    return Data(train, test, classes, origin, (train.labels, test.labels), notes)


def subset(samples: Any, index: Tensor) -> Any:
    """Those samples of these numbers."""
    if isinstance(samples, Held):
        return Held(samples.inputs[index], samples.labels[index])
    part = torch.utils.data.Subset(samples.dataset, index.tolist())
    return Streamed(part, samples.collate, samples.workers)


def checked(data: Data, where: str) -> Data:
    """The data, with labels that a classifier can learn."""
    for name, samples in (("training", data.train), ("test", data.test)):
        if len(samples) < 2:
            raise UsageError(
                f"the {name} data holds {len(samples)} samples", where=where, next_step="it needs 2 or more"
            )
    if data.labels is None:
        return data
    for name, labels in zip(("training", "test"), data.labels, strict=True):
        if int(labels.min()) < 0:
            raise UsageError(
                f"a {name} label is {int(labels.min())}",
                where=where,
                next_step="number the classes from 0; leave samples without a class out",
            )
    if len(data.labels[0].unique()) < 2:
        raise UsageError(
            f"every training sample is of class {int(data.labels[0][0])}",
            where=where,
            next_step="there is nothing to tell apart; give samples of two classes or more",
        )
    if int(data.labels[1].max()) >= data.classes:
        raise UsageError(
            f"the test labels go up to {int(data.labels[1].max())}, and the training labels only up to "
            f"{data.classes - 1}",
            where=where,
            next_step="number the classes alike in both parts; shuffle data that lies in order before a cut",
        )
    return data
