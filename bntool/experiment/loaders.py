"""Labelled data from the user's own code: datasets, loaders, iterables of batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.experiment.samples import Data, Held, Samples, Streamed, held, labels_of, pair_of
from bntool.files.scripts import named_in, running_user_code


def loader_data(ref: str, seed: int, kinds: str) -> Data:
    """The data of `pkg.mod:loader` or `file.py:loader`; `kinds` is what else there could be, for an error."""
    source = named_in(ref, kinds)
    with _user_code(ref):
        torch.manual_seed(seed)  # data that is generated is the same every time
        pair = source() if callable(source) else source
    return paired(pair, ref)


def paired(pair: Any, ref: str) -> Data:
    """The data of a pair of datasets, loaders or iterables of batches: to train on, and to test."""
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
        return held(part.tensors[0], part.tensors[1], where)
    if isinstance(part, Mapping):  # all samples of the part as one batch
        return _read_through([part], where)
    if hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, tuple | list):
        return Streamed(part, collate)
    if isinstance(part, tuple | list) and len(part) == 2 and all(hasattr(one, "shape") for one in part):
        return held(part[0], part[1], where)
    return _read_through(part, where)


def _read_through(batches: Any, where: str) -> Held:
    if not isinstance(batches, Iterable):
        raise UsageError(
            f"a part of the data is a {type(batches).__name__}",
            where=where,
            next_step="return datasets, loaders, or iterables of (inputs, labels) batches",
        )
    pairs = [pair_of(item, where) for item in batches]
    if not pairs:
        raise UsageError("the data holds no sample", where=where, next_step="give (inputs, labels) batches")
    return held(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]), where)


def _targets(samples: Samples) -> Tensor | None:
    """The labels that a dataset keeps under the name that torchvision gives them."""
    found = getattr(getattr(samples, "dataset", None), "targets", None)
    if found is None or len(found) != len(samples):
        return None
    return labels_of(found, "targets")


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
