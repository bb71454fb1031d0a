"""Batches of real data: arrays, tensors, folders of images, the user's own loaders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bntool.core.errors import UsageError
from bntool.data.arrays import KINDS, arrays_in, axes_fit, chosen_arrays, of_split, shape_text, tensor_of
from bntool.data.choosing import Choice, included, part_of, told
from bntool.data.columns import read_columns
from bntool.data.images import Preparation, converted, find_images, image_batch
from bntool.data.loaders import loaded_batches
from bntool.data.records import Records, records_at
from bntool.files.scripts import named_in
from bntool.graph.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches as model inputs, made anew each time they are iterated.

    `origin` says where they come from, `notes` which samples they are; of a loader some are known only when
    it was read. `images` tells that they are made of images.
    """

    make: Callable[[], Iterator[Inputs]]
    origin: str
    notes: list[str] = dataclasses.field(default_factory=list)
    images: bool = False

    def __iter__(self) -> Iterator[Inputs]:
        return self.make()


def batches_from(source: Any, choice: Choice, preparation: Preparation) -> Batches:
    """Batches from a file of arrays, images, records, `pkg.mod:loader`, or an iterable of batches.

    Args:
        source: arrays and tensors have the samples on axis 0: (samples, *the model's input without its batch
            axis). Records are what `data.records` reads. A loader is an iterable of batches,
            or a function that returns one.
        choice: which samples, in what order and in batches of what size. Those of other processes are not
            read, unless from an iterable.
        preparation: what images are made into; its `like` is what the model takes: data whose axes or type do
            not fit it is refused.

    Raises:
        UsageError: no data, or data that does not fit; what was found is named.
        LoadError: a source that cannot be read.
    """
    like = preparation.like
    if not isinstance(source, str | os.PathLike):
        return _of_loader(source, type(source).__name__, choice, preparation, named=False)
    text = os.fspath(source)
    path = Path(text)
    records = records_at(path, choice.split, text)
    if records is not None:
        return _of_records(records, choice, preparation)
    if path.is_dir():
        return _of_folder(path, text, choice, preparation)
    if path.is_file():
        preparation.require_unused(text)
        choice.require_unused(text, "include", "columns")
        arrays = chosen_arrays(of_split(arrays_in(path), choice.split, text), like, text)
        return _of_arrays(arrays, text, choice, like)
    return _of_loader(named_in(text, KINDS), text, choice, preparation, named=True)


# -- sources -------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, text: str, choice: Choice, preparation: Preparation) -> Batches:
    choice.require_unused(text, "columns")
    ready = preparation.checked(text)
    part = part_of(folder, choice.split)
    files = included(find_images(part), part, choice.include)
    order = choice.order(len(files))
    parts = choice.parts(order, text)
    used = [files[number] for number in order]
    remarks = (told(used, len(files), part), converted(used, ready.size[0]))

    def make() -> Iterator[Inputs]:
        for numbers in parts:
            yield fitted(Inputs((image_batch([files[n] for n in numbers], ready),)), ready.like, text)

    return Batches(make, text, [remark for remark in remarks if remark], images=True)


def _of_records(records: Records, choice: Choice, preparation: Preparation) -> Batches:
    where, like = records.where, preparation.like
    choice.require_unused(where, "include")
    order = choice.order(records.length)
    parts = choice.parts(order, where)
    columns = read_columns(records, choice.columns, [n for part in parts for n in part], preparation)

    def make() -> Iterator[Inputs]:
        for numbers in parts:
            yield _arranged({c.name: c.tensor(numbers, where) for c in columns.inputs}, like, where)

    of = "" if len(order) == records.length else f" of {records.length}"
    return Batches(
        make, where, [f"{len(order)}{of} samples of {records.what}, {where}{columns.told}"], columns.images
    )


def _of_arrays(arrays: dict[str, Any], text: str, choice: Choice, like: Inputs | None) -> Batches:
    length = len(next(iter(arrays.values())))
    order = choice.order(length)
    parts = choice.parts(order, text)
    _taken(arrays, parts[0] if parts else order[:1], like, text)  # whether it fits, before any work

    def make() -> Iterator[Inputs]:
        for numbers in parts:
            yield _taken(arrays, numbers, like, text)

    of = "" if len(order) == length else f" of {length}"
    return Batches(make, text, [f"{len(order)}{of} samples of {text}: {', '.join(arrays)}"])


def _of_loader(source: Any, text: str, choice: Choice, preparation: Preparation, *, named: bool) -> Batches:
    preparation.require_unused(text)
    choice.require_unused(text, "split", "include", "columns")
    heard: list[str] = []

    def make() -> Iterator[Inputs]:
        empty = True
        for inputs in loaded_batches(source, text, preparation.like, choice, heard, named=named):
            empty = False
            yield fitted(_of_mapping(inputs, preparation.like, text), preparation.like, text)
        if empty and choice.share[1] == 1:
            raise UsageError("the loader gives no batch", where=text, next_step="give at least one")

    return Batches(make, text, heard)


def _taken(arrays: dict[str, Any], numbers: list[int], like: Inputs | None, where: str) -> Inputs:
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise UsageError(f"the arrays do not hold equally many samples: {lengths}", where=where)
    return _arranged({name: tensor_of(array[numbers], where) for name, array in arrays.items()}, like, where)


def _arranged(parts: dict[str, Tensor], like: Inputs | None, where: str) -> Inputs:
    """Tensors by name as inputs: by keyword where the model takes that name so."""
    kwargs = {name: parts.pop(name) for name in list(parts) if like is not None and name in like.kwargs}
    return fitted(Inputs(tuple(parts.values()), kwargs), like, where)


def _of_mapping(inputs: Inputs, like: Inputs | None, where: str) -> Inputs:
    """Of a mapping with more entries than the model has inputs, such as labels, those that are inputs."""
    given = inputs.tensors()
    if like is None or inputs.args or len(given) <= len(like.tensors()):
        return inputs
    return _arranged(chosen_arrays(given, like, where), like, where)


# -- fitting -------------------------------------------------------------------------------------------------


def fitted(inputs: Inputs, like: Inputs | None, where: str) -> Inputs:
    """The inputs in the types of `like`. Raises `UsageError` where axes, channels or types do not fit."""
    if like is None:
        return inputs
    given, wanted = inputs.tensors(), like.tensors()
    if len(given) != len(wanted):
        raise UsageError(
            f"a batch holds {len(given)} tensors, and the model takes {len(wanted)} ({like.shapes()})",
            where=where,
            next_step="give as many tensors as the model takes inputs",
        )
    for tensor, example in zip(given.values(), wanted.values(), strict=True):
        if not axes_fit(tensor.shape, example):
            shapes = shape_text(tensor.shape), shape_text(example.shape)
            raise UsageError(
                f"the data has batches of {shapes[0]}, and the model takes {shapes[1]}",
                where=where,
                next_step=_way_to_fit(tensor, example),
            )
        if tensor.is_floating_point() != example.is_floating_point():
            raise UsageError(
                f"the data is {_type(tensor)}, and the model takes {_type(example)}",
                where=where,
                next_step="convert it the way the training did (images: astype('float32') / 255, mean, std)",
            )
    dtype = next((t.dtype for t in wanted.values() if t.is_floating_point()), None)
    return inputs.to(dtype=dtype)


def _way_to_fit(tensor: Tensor, example: Tensor) -> str:
    """What makes the data fit, where it is plain to see."""
    if tensor.dim() == example.dim() == 4 and axes_fit(tensor.movedim(-1, 1).shape, example):
        return "the channels lie last, and the model takes them on axis 1: numpy.moveaxis(x, -1, 1)"
    if axes_fit(tensor[None].shape, example):
        return "these are single samples: give batches of them, with the samples on axis 0 (numpy.stack)"
    return "samples lie on axis 0; --input names the model's input if it was guessed wrongly"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
