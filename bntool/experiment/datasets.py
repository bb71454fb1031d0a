"""Labelled data for training: known sets, folders of images, arrays, the user's own loaders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.data.arrays import arrays_in
from bntool.data.images import Preparation, image_batch
from bntool.files.scripts import import_path, import_script, running_user_code
from bntool.graph.inputs import Inputs

KINDS = "mnist, fashion-mnist, a folder of images, an .npz file, or pkg.mod:loader"
KNOWN = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_HELD_OUT = 5
"""One sample in so many is held out for the test where the data has no part for it."""
_IN_MEMORY = 1 << 29
"""Bytes up to which images from files are decoded once and kept."""


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
            yield _pair(item, type(self.dataset).__name__)

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

    def fingerprint(self) -> str:
        """Tells apart data that a run cannot go on with: sizes, labels and the first samples."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)}".encode())
        for tensor in (*(self.labels or ()), *self.example().args):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def open_dataset(
    ref: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    like: Inputs | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Data:
    """Labelled training and test data.

    `mnist`, `fashion-mnist`: torchvision's, below `root`, loaded down only with `download`, normalised by
    the mean and standard deviation of the training images. A folder: `train/` and `test/` (or `val/`), each
    with a folder of images for each class; or the class folders alone. An `.npz`: x_train, y_train, x_test,
    y_test; or x and y. Where there is no test part, a fifth is held out by `seed`. `pkg.mod:loader` or
    `file.py:loader`: a pair, or a function that returns one, of datasets, loaders or iterables of batches.
    Images are made to the size of `like`, then (x − mean)/std.

    Raises:
        LoadError: data that is missing or cannot be read.
        UsageError: labels that do not fit, one class, too few samples.
    """
    if ref in KNOWN:
        data = _known(ref, Path(root) if root is not None else Path("data"), download)
    elif Path(ref).is_dir():
        data = _folder(Path(ref), Preparation(like, mean, std).checked(ref), seed)
    else:
        Preparation(like, mean, std).require_unused(ref)
        data = _npz(Path(ref), seed) if Path(ref).is_file() else _loader(ref, seed)
    return _checked(data, ref)


# -- sources -------------------------------------------------------------------------------------------------


def _known(ref: str, root: Path, download: bool) -> Data:
    datasets = _torchvision_datasets(ref)
    try:
        parts = [
            getattr(datasets, KNOWN[ref])(str(root), train, download=download) for train in (True, False)
        ]
    except (RuntimeError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"cannot read {ref}: {lines[0]}",
            where=str(root.absolute()),
            next_step=f"--root FOLDER, which holds {KNOWN[ref]}/raw, or --download",
        ) from error
    pixels = parts[0].data.float().div(255)
    mean, std = (0.1307, 0.3081) if ref == "mnist" else (float(pixels.mean()), float(pixels.std()))
    held = [
        Held(p.data.unsqueeze(1).float().div(255).sub(mean).div(std), p.targets.to(torch.int64))
        for p in parts
    ]
    note = f"{ref}: pixels in 0..1, less {mean:.4f}, divided by {std:.4f}"
    return _held_data(held[0], held[1], ref, note)


def _folder(folder: Path, preparation: Preparation, seed: int) -> Data:
    datasets = _torchvision_datasets("a folder of images")
    decode = functools.partial(_decoded, preparation=preparation)
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test is None:
        raise UsageError(
            "there is a folder train, and neither test nor val",
            where=str(folder),
            next_step="add one of them",
        )
    places = [folder / "train", test] if test is not None else [folder]
    try:
        found = [datasets.ImageFolder(str(place), loader=decode) for place in places]
    except (FileNotFoundError, OSError) as error:
        raise LoadError(
            f"the folder is no data set of images: {str(error).splitlines()[0]}",
            where=str(folder),
            next_step="it needs a folder of images for each class, or train/ and test/ with such folders",
        ) from error
    if len(found) == 2 and found[0].classes != found[1].classes:
        odd = sorted(set(found[0].classes) ^ set(found[1].classes))
        raise UsageError(
            f"the training and the test images have other classes: {', '.join(odd[:5])}", where=str(folder)
        )
    whole = [_maybe_held(one, preparation) for one in found]
    labels = [torch.tensor(one.targets, dtype=torch.int64) for one in found]
    if len(found) == 1:
        train, test_part = _split(len(whole[0]), seed, folder)
        parts: list[Samples] = [_subset(whole[0], train), _subset(whole[0], test_part)]
        labels = [labels[0][train], labels[0][test_part]]
        note: tuple[str, ...] = (_split_note(seed),)
    else:
        parts, note = whole, ()
    return Data(parts[0], parts[1], len(found[0].classes), str(folder), (labels[0], labels[1]), note)


def _decoded(path: str, preparation: Preparation) -> Tensor:
    return image_batch([Path(path)], preparation)[0]


def _maybe_held(dataset: Any, preparation: Preparation) -> Samples:
    """The images decoded once where they are small; decoded for each batch by workers where not."""
    channels, height, width = preparation.size
    if len(dataset) * channels * height * width * 4 > _IN_MEMORY:
        return Streamed(dataset, workers=min(4, os.cpu_count() or 1))
    files = [Path(path) for path, _ in dataset.samples]
    inputs = torch.cat([image_batch(files[i : i + 64], preparation) for i in range(0, len(files), 64)])
    return Held(inputs, torch.tensor(dataset.targets, dtype=torch.int64))


def _npz(path: Path, seed: int) -> Data:
    if path.suffix != ".npz":
        raise LoadError(
            f"{path.name} is no training data that bntool reads", where=str(path), next_step=f"give {KINDS}"
        )
    arrays = arrays_in(path)
    names = {"x_train", "y_train", "x_test", "y_test"}
    if names <= set(arrays):
        held = [
            _held(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}, {part}") for part in ("train", "test")
        ]
        return _held_data(held[0], held[1], str(path))
    if {"x", "y"} <= set(arrays):
        whole = _held(arrays["x"], arrays["y"], str(path))
        parts = [_subset(whole, index) for index in _split(len(whole), seed, path)]
        return _held_data(parts[0], parts[1], str(path), _split_note(seed))
    raise UsageError(
        f"the file holds {', '.join(arrays) or 'nothing'}",
        where=str(path),
        next_step="name the arrays x_train, y_train, x_test and y_test; or x and y",
    )


def _loader(ref: str, seed: int) -> Data:
    head, colon, name = ref.rpartition(":")
    if not colon or not name.isidentifier():
        raise LoadError(f"no such data: {ref}", next_step=f"give {KINDS}")
    module = import_script(Path(head)) if head.endswith(".py") else import_path(head)
    if not hasattr(module, name):
        raise LoadError(f"{head} has no {name}", where=ref, next_step="check the name of the loader")
    source = getattr(module, name)
    with _user_code(ref):
        torch.manual_seed(seed)  # data that is generated is the same every time
        pair = source() if callable(source) else source
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UsageError(
            f"the loader gives a {type(pair).__name__}", where=ref, next_step="return (train, test)"
        )
    with _user_code(ref):
        parts = [_samples(part, ref) for part in pair]
    labels = [part.labels if isinstance(part, Held) else _targets(part) for part in parts]
    both = (labels[0], labels[1]) if labels[0] is not None and labels[1] is not None else None
    classes = 0 if both is None or not len(both[0]) else int(both[0].max()) + 1
    return Data(parts[0], parts[1], classes, ref, both)


def _samples(part: Any, where: str) -> Samples:
    """A dataset or a loader of one, by number; an iterable of batches is read once and kept."""
    collate = None
    if isinstance(part, torch.utils.data.DataLoader):
        if isinstance(part.dataset, torch.utils.data.IterableDataset):
            return _read_through(part, where)
        part, collate = part.dataset, part.collate_fn
    if isinstance(part, torch.utils.data.TensorDataset) and len(part.tensors) == 2:
        return _held(part.tensors[0], part.tensors[1], where)
    if hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, tuple | list):
        return Streamed(part, collate)
    if isinstance(part, tuple | list) and len(part) == 2 and all(hasattr(one, "shape") for one in part):
        return _held(part[0], part[1], where)
    return _read_through(part, where)


def _read_through(batches: Any, where: str) -> Held:
    if not isinstance(batches, Iterable):
        raise UsageError(
            f"a part of the data is a {type(batches).__name__}",
            where=where,
            next_step="return datasets, loaders, or iterables of (inputs, labels) batches",
        )
    pairs = [_pair(item, where) for item in batches]
    if not pairs:
        raise UsageError("the data holds no sample", where=where, next_step="give (inputs, labels) batches")
    return _held(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]), where)


def _targets(samples: Samples) -> Tensor | None:
    """The labels that a dataset keeps under the name that torchvision gives them."""
    found = getattr(getattr(samples, "dataset", None), "targets", None)
    if found is None or len(found) != len(samples):
        return None
    return _labels(found, "targets")


# -- pieces --------------------------------------------------------------------------------------------------


def _pair(item: Any, where: str) -> tuple[Tensor, Tensor]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UsageError(
            f"a batch is a {type(item).__name__}", where=where, next_step="give (inputs, labels) pairs"
        )
    inputs = item[0] if isinstance(item[0], Tensor) else torch.as_tensor(np.asarray(item[0]))
    return inputs, _labels(item[1], where)


def _labels(values: Any, where: str) -> Tensor:
    labels = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype is torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise UsageError(
            f"the labels are {kind} of shape {list(labels.shape)}",
            where=where,
            next_step="give one whole number for each sample: the number of its class, from 0",
        )
    return labels.to(torch.int64)


def _held(inputs: Any, labels: Any, where: str) -> Held:
    try:
        tensor = inputs if isinstance(inputs, Tensor) else torch.from_numpy(np.asarray(inputs))
    except TypeError as error:
        raise UsageError(f"the inputs cannot be read: {error}", where=where) from error
    held = Held(tensor.detach(), _labels(labels, where))
    if len(tensor) != len(held.labels):
        raise UsageError(
            f"there are {len(tensor)} samples and {len(held.labels)} labels",
            where=where,
            next_step="give one label for each sample",
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UsageError("the data holds NaN or infinite values", where=where, next_step="clean the data")
    return held


def _held_data(train: Held, test: Held, origin: str, *notes: str) -> Data:
    classes = int(train.labels.max()) + 1 if len(train) else 0
    return Data(train, test, classes, origin, (train.labels, test.labels), notes)


def _split(length: int, seed: int, where: Path) -> tuple[Tensor, Tensor]:
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


def _split_note(seed: int) -> str:
    return f"no test part in the data: a fifth is held out (seed {seed})"


def _subset(samples: Any, index: Tensor) -> Any:
    if isinstance(samples, Held):
        return Held(samples.inputs[index], samples.labels[index])
    subset = torch.utils.data.Subset(samples.dataset, index.tolist())
    return Streamed(subset, samples.collate, samples.workers)


def _torchvision_datasets(what: str) -> Any:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise LoadError(
            f"{what} needs torchvision, which is not installed", next_step="pip install 'bntool[compare]'"
        ) from error
    return torchvision.datasets


@contextlib.contextmanager
def _user_code(ref: str) -> Iterator[None]:
    try:
        with running_user_code(Path.cwd(), first=False):
            yield
    except BntoolError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise LoadError(
            f"the loader raised {type(error).__name__}: {lines[0]}",
            where=ref,
            next_step="it must be a function without arguments that returns (train, test)",
        ) from error


def _checked(data: Data, where: str) -> Data:
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
            next_step="number the classes alike in both parts",
        )
    return data
