"""Labelled data for training: known sets, folders of images, arrays, the user's own loaders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from bntool.core.errors import LoadError, UsageError
from bntool.data.arrays import arrays_in
from bntool.data.choosing import Choice, included, kind_of, part_named, part_of, told
from bntool.data.images import Preparation, converted, find_images
from bntool.data.records import are_records
from bntool.experiment.loaders import loader_data, paired
from bntool.experiment.parts import Images, decoded, held_out_of, of_parts, split_note, two_parts
from bntool.experiment.recorded import recorded
from bntool.experiment.samples import Data, Held, checked, held, held_data, subset

KINDS = "mnist, fashion-mnist, a folder of images, an .npz, .parquet or .tar file, or pkg.mod:loader"
KNOWN = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def open_dataset(
    source: Any,
    choice: Choice | None = None,
    preparation: Preparation | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Data:
    """Labelled training and test data.

    Args:
        source: `mnist`, `fashion-mnist`: torchvision's, below `root`, normalised by the mean and standard
            deviation of the training images. A folder: `train/` and `test/` (or `val/`), each with a folder
            of images for each class; or the class folders alone. An `.npz`: x_train, y_train, x_test, y_test;
            or x and y. Records of `data.records`, their parts by the names of their files, with a column of
            labels. `pkg.mod:loader` or `file.py:loader`: a pair, or a function that returns one, of
            datasets, loaders or iterables of batches; or such a pair itself.
        choice: `split` names the training and the test part, as `train,val`; where there is no test part, a
            fifth is held out by `seed`. `samples` is the most that are taken of each part, drawn by `seed`.
        preparation: what images are made into.
        root: the folder of torchvision's data sets; `data` where it is not given.
        download: whether torchvision may load them down.

    Raises:
        LoadError: data that is missing or cannot be read.
        UsageError: labels that do not fit, one class, too few samples.
    """
    choice, preparation = choice or Choice(), preparation or Preparation(None)
    if not isinstance(source, str | os.PathLike):
        ref = type(source).__name__
        _require_choice_of_others(ref, choice, preparation, "split")
        data = paired(source, ref)
    elif (ref := os.fspath(source)) in KNOWN:
        _require_choice_of_others(ref, choice, preparation, "split")
        data = _known(ref, Path(root or "data"), download)
    else:
        data = _at(ref, choice, preparation)
    return checked(_limited(data, choice), ref)


def _at(ref: str, choice: Choice, preparation: Preparation) -> Data:
    """What lies at a path, or what a loader gives."""
    path = Path(ref)
    if are_records(path):
        choice.require_unused(ref, "include")
        return recorded(path, preparation, choice)
    if path.is_dir():
        choice.require_unused(ref, "columns")
        return _folder(path, preparation.checked(ref), choice)
    if path.is_file():
        _require_choice_of_others(ref, choice, preparation)
        return _npz(path, choice)
    _require_choice_of_others(ref, choice, preparation, "split")
    return loader_data(ref, choice.seed, KINDS)


def _require_choice_of_others(ref: str, choice: Choice, preparation: Preparation, *more: str) -> None:
    """Raise `UsageError` where what only images or records have was asked of other data."""
    preparation.require_unused(ref)
    choice.require_unused(ref, "include", "columns", *more)


def _limited(data: Data, choice: Choice) -> Data:
    """Data with at most `choice.samples` of each part."""
    parts = [data.train, data.test]
    if choice.samples is None or max(map(len, parts)) <= choice.samples:
        return data
    orders = [torch.tensor(choice.order(len(part))).sort().values for part in parts]
    train, test = (subset(part, order) for part, order in zip(parts, orders, strict=True))
    labels = None
    if data.labels is not None:
        labels = data.labels[0][orders[0]], data.labels[1][orders[1]]
    note = f"{len(train)} samples to train on, {len(test)} to test, drawn by seed {choice.seed}"
    return dataclasses.replace(data, train=train, test=test, labels=labels, notes=(*data.notes, note))


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
    both = [
        Held(p.data.unsqueeze(1).float().div(255).sub(mean).div(std), p.targets.to(torch.int64))
        for p in parts
    ]
    note = f"{ref}: pixels in 0..1, less {mean:.4f}, divided by {std:.4f}"
    return held_data(both[0], both[1], ref, note)


def _folder(folder: Path, preparation: Preparation, choice: Choice) -> Data:
    places = _places(folder, choice.split)
    files = [included(find_images(place), place, choice.include) for place in places]
    files = [[f for f in part if kind_of(f, place)] for part, place in zip(files, places, strict=True)]
    classes = [sorted({kind_of(f, place) for f in part}) for part, place in zip(files, places, strict=True)]
    if len(classes[0]) < 2:
        one = (
            f"images of one class, {classes[0][0]}" if classes[0] else "images, and no folder for each class"
        )
        raise LoadError(
            f"the folder is no data set of images: {places[0]} holds {one}",
            where=str(folder),
            next_step="it needs a folder of images for each class, or train/ and test/ with such folders",
        )
    if classes[0] != classes[-1]:
        odd = sorted(set(classes[0]) ^ set(classes[-1]))
        raise UsageError(
            f"the training and the test images have other classes: {', '.join(odd[:5])}", where=str(folder)
        )
    notes = [told(part, len(part), place) for part, place in zip(files, places, strict=True)]
    notes.append(converted(files[0], preparation.size[0]))
    found = [
        Images(part, [classes[0].index(kind_of(f, place)) for f in part], preparation)
        for part, place in zip(files, places, strict=True)
    ]
    parts = [decoded(one) for one in found]
    labels = [torch.tensor(one.targets, dtype=torch.int64) for one in found]
    return of_parts(parts, labels, len(classes[0]), folder, notes, choice.seed)


def _places(folder: Path, split: str | None) -> list[Path]:
    """The folders of the training and of the test part; the folder alone where it has none."""
    if split is not None:
        return [part_of(folder, name) for name in two_parts(split, str(folder))]
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if [part_named(path.name) for path in inside] == ["train"]:
        raise UsageError(
            "there is a folder train, and neither test nor val",
            where=str(folder),
            next_step="add one of them",
        )
    training = part_of(folder, None)
    tests = [path for name in ("test", "val") for path in inside if part_named(path.name) == name]
    return [training, tests[0]] if training != folder and tests else [folder]


def _npz(path: Path, choice: Choice) -> Data:
    if path.suffix != ".npz":
        raise LoadError(
            f"{path.name} is no training data that bntool reads", where=str(path), next_step=f"give {KINDS}"
        )
    arrays = arrays_in(path)
    parts = two_parts(choice.split, str(path)) if choice.split else ["train", "test"]
    names = [f"{array}_{part}" for part in parts for array in "xy"]
    if set(names) <= set(arrays):
        both = [held(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}, {part}") for part in parts]
        return held_data(both[0], both[1], str(path))
    if {"x", "y"} <= set(arrays) and not choice.split:
        whole = held(arrays["x"], arrays["y"], str(path))
        both = [subset(whole, index) for index in held_out_of(len(whole), choice.seed, path)]
        return held_data(both[0], both[1], str(path), split_note(choice.seed))
    raise UsageError(
        f"the file holds {', '.join(arrays) or 'nothing'}",
        where=str(path),
        next_step=f"name the arrays {', '.join(names)}; or x and y",
    )


def _torchvision_datasets(what: str) -> Any:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise LoadError(
            f"{what} needs torchvision, which is not installed", next_step="pip install 'bntool[compare]'"
        ) from error
    return torchvision.datasets
