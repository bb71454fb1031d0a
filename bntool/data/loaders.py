"""The user's own loaders: iterables of batches, and functions that return one."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.data.choosing import Choice
from bntool.files.scripts import running_user_code
from bntool.graph.inputs import Inputs

SHUFFLED = "the loader reads its data set in order; its samples are drawn by the seed (--no-shuffle keeps it)"
_LOADER = "it must be an iterable of batches, or a function without arguments that returns one"
PARTS = "the loader gives {} parts; the first, to train on, is read"


def inputs_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Each batch as inputs of `model`: a tensor, `(input, target)`, a mapping of keywords, or `Inputs`.

    Of a tuple the first is the input, or the first few where `forward` requires several. A single tensor
    as `batches` is one batch. A last batch of one sample joins the one before it. Raises `UsageError` for
    anything else.
    """
    if isinstance(batches, Tensor | Inputs):
        batches = [batches]
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(
            f"batches is a {type(batches).__name__}",
            next_step="pass an iterable of batches, such as a DataLoader; open_batches reads files",
        )
    needed = _required_inputs(model)
    yield from joined(as_inputs(item, needed).named_for(model.forward) for item in batches)


def _required_inputs(model: nn.Module) -> int:
    """How many positional inputs `forward` cannot do without; at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


def as_inputs(item: Any, needed: int) -> Inputs:
    """One batch as inputs, of which the model needs so many. Raises `UsageError` for what is no batch."""
    if isinstance(item, Inputs):
        return item
    if isinstance(item, Tensor):
        return Inputs((item,))
    if isinstance(item, np.ndarray):
        return Inputs((torch.from_numpy(np.array(item)),))
    if isinstance(item, Mapping):
        return Inputs((), dict(item))
    first = item[0] if isinstance(item, tuple | list) and item else None
    if needed > 1 and isinstance(first, tuple | list) and len(first) == needed:  # ((one, other), target)
        return Inputs(tuple(first))
    if isinstance(item, tuple | list) and len(item) >= needed:
        return Inputs(tuple(item[:needed]))
    held = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise UsageError(
        f"a batch is a {type(item).__name__}{held}, and the model takes {needed} "
        f"{'input' if needed == 1 else 'inputs'}",
        next_step="give tensors, (input, target) tuples, or mappings of keyword inputs",
    )


def loaded_batches(
    source: Any, text: str, like: Inputs | None, choice: Choice, heard: list[str], *, named: bool
) -> Iterator[Inputs]:
    """Batches from an iterable, or a function that returns one; a named one's prints stay off stdout.

    A `DataLoader` that goes through its data set in order is made anew to draw from it, unless
    `choice.shuffle` is off; that is added to `heard`.
    """
    needed = max(1, len(like.args)) if like is not None else 1
    around: Any = _as_user_code if named else contextlib.nullcontext

    def read() -> Iterator[Inputs]:
        with around():
            found = itertools.islice(_called(source, text, choice, heard), choice.batches)
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
            yield as_inputs(item, needed)

    rank, size = choice.share
    return itertools.islice(joined(limited(read(), choice.samples)), rank, None, size)


def joined(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The batches; a last one of one sample joins the one before, since by itself it has no variance.

    One is held back while the next is asked for; it is a copy, for a loader may fill one buffer again and
    again.
    """
    waiting: list[Inputs] = []
    for inputs in batches:
        lone = len(waiting) == 1 and samples_of(inputs) == 1 < samples_of(waiting[0])
        if not lone:
            yield from waiting
            waiting = []
        waiting.append(inputs.map(Tensor.clone))
    yield from _together(*waiting) if len(waiting) > 1 else waiting


def limited(batches: Iterable[Inputs], samples: int | None) -> Iterator[Inputs]:
    """The first so many samples of the batches; the last batch is cut."""
    left = samples
    for inputs in batches:
        number = samples_of(inputs)
        if left is None or number <= left:
            yield inputs
        else:
            yield inputs.map(lambda t, n=number, m=left: t[:m] if t.dim() and len(t) == n else t)
        if left is not None:
            left -= number
            if left <= 0:
                return


def samples_of(inputs: Inputs) -> int:
    """How many samples a batch holds, by axis 0 of its first tensor; 0 where that has no axis."""
    first = next(iter(inputs.tensors().values()), None)
    return len(first) if first is not None and first.dim() else 0


def _together(first: Inputs, second: Inputs) -> tuple[Inputs, ...]:
    """Both as one batch, where their tensors fit together; else the two."""
    ones, others = first.tensors(), second.tensors()
    alike = ones.keys() == others.keys() and all(
        one.dim() and one.dtype == others[name].dtype and one.shape[1:] == others[name].shape[1:]
        for name, one in ones.items()
    )
    if not alike:
        return first, second
    parts = iter(others.values())
    return (first.map(lambda tensor: torch.cat([tensor, next(parts)])),)


def _as_user_code() -> contextlib.AbstractContextManager[None]:
    return running_user_code(Path.cwd(), first=False)


def _called(source: Any, text: str, choice: Choice, heard: list[str]) -> Iterator[Any]:
    if isinstance(source, Tensor | Inputs):
        return iter([source])
    try:
        found = source() if callable(source) and not isinstance(source, Iterable | Dataset) else source
        if _are_parts(found):
            _hear(heard, PARTS.format(len(found)))
            found = found[0]
        if isinstance(found, Dataset) and not isinstance(found, IterableDataset):
            found = DataLoader(found, batch_size=choice.batch_size)
        if choice.shuffle and _goes_in_order(found):
            found = _drawing(found, choice.seed)
            _hear(heard, SHUFFLED)
        if isinstance(found, Iterable) or hasattr(found, "__getitem__"):
            return iter(found)
    except Exception as error:
        raise _loader_failed(text, error) from error
    raise UsageError(f"the loader gives a {type(found).__name__}", where=text, next_step=_LOADER)


def _are_parts(found: Any) -> bool:
    """Whether it is what `compare` takes: data sets or loaders to train on and to test, and maybe more."""
    return (
        isinstance(found, tuple | list)
        and len(found) > 1
        and all(isinstance(one, Dataset | DataLoader) for one in found)
    )


def _hear(heard: list[str], note: str) -> None:
    if note not in heard:
        heard.append(note)


def _goes_in_order(loader: Any) -> bool:
    """Whether this is a plain loader of a data set with numbers, which shuffle=False makes read in order."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) is BatchSampler
        and len(loader.sampler) > 0  # of nothing no order can be drawn
    )


def _drawing(loader: Any, seed: int) -> Any:
    """The same loader with shuffle=True, by a generator of its own."""
    alike = ("batch_size", "num_workers", "collate_fn", "drop_last", "timeout", "worker_init_fn")
    about = {name: getattr(loader, name) for name in alike}
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(loader.dataset, shuffle=True, generator=generator, **about)


def _loader_failed(text: str, error: Exception) -> LoadError:
    lines = str(error).strip().splitlines() or [""]
    return LoadError(
        f"the loader raised {type(error).__name__}: {lines[0]}",
        where=text,
        next_step=_LOADER,
    )
