"""Batches of real data: arrays, tensors, folders of images, the user's own loaders."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.data.arrays import KINDS, arrays_in, axes_fit, chosen_arrays, shape_text, tensor_of
from bntool.data.images import Preparation, find_images, image_batch
from bntool.files.scripts import import_path, import_script, running_user_code
from bntool.graph.inputs import Inputs

_Make = Callable[[slice], Iterator[Inputs]]
"""Makes those batches whose numbers a slice picks."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches as model inputs, made anew each time they are iterated. `origin` says where they come from."""

    make: Callable[[], Iterator[Inputs]]
    origin: str

    def __iter__(self) -> Iterator[Inputs]:
        return self.make()


def open_batches(
    source: Any,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    like: Inputs | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches from a file of arrays, a folder of images, `pkg.mod:loader`, or an iterable of batches.

    Arrays and tensors have the samples on axis 0: (samples, *the model's input without its batch axis);
    `batch_size` cuts them, and a last batch of one sample joins the one before, since it would have no
    variance. Images are scaled to 0..1, resized and cropped to the size of `like`, then (x − mean)/std.
    A loader is an iterable of batches, or a function that returns one. `like` are example inputs: data
    whose axes or type do not fit them is refused. At most `limit` batches; of those, `share` (rank, size)
    takes every size-th from number `rank` on. Samples of the others are not read, unless from an iterable.

    Raises:
        UsageError: no data, or data that does not fit `like`; both shapes are named.
        LoadError: a source that cannot be read.
    """
    for name, value in (("batch size", batch_size), ("number of batches", limit)):
        if value is not None and value < 1:
            raise UsageError(f"the {name} is {value}", next_step="it must be at least 1")
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        make = _from_path(text, batch_size, like, Preparation(like, mean, std))
    else:
        text = type(source).__name__
        make = _from_iterable(source, text, like, named=False)
    rank, size = share
    return Batches(lambda: make(slice(rank, limit, size)), text)


def inputs_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Each batch as inputs of `model`: a tensor, `(input, target)`, a mapping of keywords, or `Inputs`.

    Of a tuple the first is the input, or the first few where `forward` requires several. A single tensor
    as `batches` is one batch. Raises `UsageError` for anything else.
    """
    if isinstance(batches, Tensor | Inputs):
        batches = [batches]
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(
            f"batches is a {type(batches).__name__}",
            next_step="pass an iterable of batches, such as a DataLoader; open_batches reads files",
        )
    needed = _required_inputs(model)
    for item in batches:
        yield _as_inputs(item, needed)


def _required_inputs(model: nn.Module) -> int:
    """How many positional inputs `forward` cannot do without; at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


def _as_inputs(item: Any, needed: int) -> Inputs:
    if isinstance(item, Inputs):
        return item
    if isinstance(item, Tensor):
        return Inputs((item,))
    if isinstance(item, np.ndarray):
        return Inputs((torch.from_numpy(np.array(item)),))
    if isinstance(item, Mapping):
        return Inputs((), dict(item))
    if isinstance(item, tuple | list) and len(item) >= needed:
        return Inputs(tuple(item[:needed]))
    held = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise UsageError(
        f"a batch is a {type(item).__name__}{held}, and the model takes {needed} inputs",
        next_step="give tensors, (input, target) tuples, or mappings of keyword inputs",
    )


# -- sources -------------------------------------------------------------------------------------------------


def _from_path(text: str, batch_size: int, like: Inputs | None, preparation: Preparation) -> _Make:
    path = Path(text)
    if path.is_dir():
        files = find_images(path)
        ready = preparation.checked(text)
        bounds = _bounds(len(files), batch_size, text)
        return lambda part: (
            fitted(Inputs((image_batch(files[a:b], ready),)), like, text) for a, b in bounds[part]
        )
    preparation.require_unused(text)
    if path.is_file():
        arrays = chosen_arrays(arrays_in(path), like, text)
        length = len(next(iter(arrays.values())))
        bounds = _bounds(length, batch_size, text)
        _sliced(arrays, *bounds[0], like, text)
        return lambda part: (_sliced(arrays, a, b, like, text) for a, b in bounds[part])
    head, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise LoadError(f"no such data: {text}", next_step=f"give {KINDS}")
    module = import_script(Path(head)) if head.endswith(".py") else import_path(head)
    if not hasattr(module, name):
        raise LoadError(f"{head} has no {name}", where=text, next_step="check the name of the loader")
    return _from_iterable(getattr(module, name), text, like, named=True)


def _from_iterable(source: Any, text: str, like: Inputs | None, *, named: bool) -> _Make:
    """Batches from an iterable, or a function that returns one; a named one's prints stay off stdout."""
    needed = max(1, len(like.args)) if like is not None else 1

    around: Any = _as_user_code if named else contextlib.nullcontext

    def make(part: slice) -> Iterator[Inputs]:
        with around():
            found = itertools.islice(_called(source, text), part.start, part.stop, part.step)
        while True:
            try:
                with around():
                    item = next(found)
            except StopIteration:
                return
            except BntoolError:
                raise
            except Exception as error:
                raise _loader_failed(text, error) from error
            yield fitted(_as_inputs(item, needed), like, text)

    return make


def _as_user_code() -> contextlib.AbstractContextManager[None]:
    return running_user_code(Path.cwd(), first=False)


def _called(source: Any, text: str) -> Iterator[Any]:
    if isinstance(source, Tensor | Inputs):
        return iter([source])
    try:
        found = source() if callable(source) and not isinstance(source, Iterable) else source
        return iter(found)
    except Exception as error:
        raise _loader_failed(text, error) from error


def _loader_failed(text: str, error: Exception) -> LoadError:
    lines = str(error).strip().splitlines() or [""]
    return LoadError(
        f"the loader raised {type(error).__name__}: {lines[0]}",
        where=text,
        next_step="it must be an iterable of batches, or a function without arguments that returns one",
    )


def _bounds(length: int, batch_size: int, where: str = "") -> list[tuple[int, int]]:
    """Where each batch begins and ends; a last batch of one joins the one before."""
    if not length:
        raise UsageError("the data holds no sample", where=where, next_step="samples lie on axis 0")
    starts = list(range(0, length, batch_size))
    if batch_size > 1 and len(starts) > 1 and length - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], length], strict=True))


def _sliced(arrays: dict[str, Any], start: int, stop: int, like: Inputs | None, where: str) -> Inputs:
    parts: dict[str, Tensor] = {}
    for name, array in arrays.items():
        parts[name] = tensor_of(array[start:stop], where)
    if len({len(part) for part in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise UsageError(f"the arrays do not hold equally many samples: {lengths}", where=where)
    kwargs = {name: parts.pop(name) for name in list(parts) if like is not None and name in like.kwargs}
    return fitted(Inputs(tuple(parts.values()), kwargs), like, where)


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
                next_step="samples lie on axis 0; --input names the model's input if it was guessed wrongly",
            )
        if tensor.is_floating_point() != example.is_floating_point():
            raise UsageError(
                f"the data is {_type(tensor)}, and the model takes {_type(example)}",
                where=where,
                next_step="convert it the way the training did (images: astype('float32') / 255, mean, std)",
            )
    dtype = next((t.dtype for t in wanted.values() if t.is_floating_point()), None)
    return inputs.to(dtype=dtype)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
