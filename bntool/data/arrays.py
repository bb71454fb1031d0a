"""Files of arrays and tensors: read without running anything, and told apart by what fits the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bntool.core.errors import LoadError, UsageError
from bntool.data.choosing import ALL, listed, part_named
from bntool.files.detect import Kind, detect
from bntool.files.numpy_files import read_npy, read_npz
from bntool.files.security.archives import Unsafe
from bntool.files.security.pickles import read_pickled
from bntool.files.tensors import require_dense
from bntool.graph.inputs import Inputs

KINDS = "an .npy, .npz, .pt, .parquet or .tar file, a folder of images, or pkg.mod:loader"


def arrays_in(path: Path) -> dict[str, Any]:
    """Arrays or tensors by name, whatever the file is called. Nothing in the file is run.

    Raises `LoadError` for a file that is damaged, holds objects, or is no data.
    """
    kind = detect(path)
    try:
        if kind.kind is Kind.NPY:
            return {"input": read_npy(path)}
        if kind.kind is Kind.NPZ:
            return dict(read_npz(path))
        if kind.kind in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY):
            return _tensors_in(read_pickled(path, kind))
    except Exception as error:  # any error can come out of a damaged file
        lines = (error.what if isinstance(error, LoadError) else str(error)).strip().splitlines() or [""]
        said = f"it {lines[0]}" if isinstance(error, Unsafe) else lines[0]
        raise LoadError(
            f"cannot read data from {path.name}: {said}",
            where=str(path),
            next_step="save plain arrays (numpy.save) or tensors (torch.save)",
        ) from error
    raise LoadError(
        f"cannot read data from {path.name}: it is {kind.description_in_full}",
        where=str(path),
        next_step=f"give {KINDS}",
    )


def tensor_of(held: Any, where: str) -> Tensor:
    """A tensor, or one made of a copy of an array; `UsageError` where torch has no such type."""
    if isinstance(held, Tensor):
        return held
    try:
        return torch.from_numpy(np.array(held))
    except TypeError as error:
        raise UsageError(
            f"the data is of type {held.dtype}", where=where, next_step="save it as float32 or int64"
        ) from error


def _tensors_in(held: Any) -> dict[str, Any]:
    if isinstance(held, Tensor):
        return {"input": held}
    if not isinstance(held, Mapping | tuple | list):
        raise Unsafe(f"holds a {type(held).__name__}, and no tensors")
    items = held.items() if isinstance(held, Mapping) else enumerate(held)
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def of_split(arrays: dict[str, Any], split: str | None, where: str) -> dict[str, Any]:
    """Those of `x_train`, `y_train`, `x_test`, … that are of a part: `split`, else the training.

    All where no name tells a part. Raises `UsageError` for a part that is not there.
    """
    parts = {name: part for name in arrays if (part := _part_in(name))}
    wanted = part_named(split or "train") or split
    if split == ALL or (split is None and wanted not in parts.values()):
        return arrays
    if wanted not in parts.values():
        raise UsageError(
            f"no array is of a part {split}: the file holds {', '.join(arrays)}",
            where=where,
            next_step="name the arrays x_train, x_test, …, or leave --split out",
        )
    return {name: array for name, array in arrays.items() if parts.get(name) in (wanted, None)}


def _part_in(name: str) -> str | None:
    return next((part for word in name.split("_") if (part := part_named(word))), None)


def chosen_arrays(arrays: dict[str, Any], like: Inputs | None, where: str) -> dict[str, Any]:
    """The arrays that are the model's inputs, by the names of `like`."""
    require_dense(arrays.items(), Path(where))
    arrays = {name: array for name, array in arrays.items() if array.ndim}
    if not arrays:
        raise UsageError("the file holds no array of samples", where=where, next_step=f"give {KINDS}")
    wanted = like.tensors() if like is not None else {}
    if wanted and set(wanted) <= set(arrays):
        return {name: arrays[name] for name in wanted}
    if len(arrays) == 1 and len(wanted) < 2:
        return arrays
    if len(wanted) == 1:
        (tensor,) = wanted.values()
        fitting = [name for name, array in arrays.items() if axes_fit(array.shape, tensor)]
        if len(fitting) == 1:
            return {"input": arrays[fitting[0]]}
    shapes = listed(f"{name} {shape_text(array.shape)}" for name, array in arrays.items())
    expected = f"takes {like.shapes()}" if like is not None else "takes one"
    samples = len(wanted) == 1 and all(axes_fit((1, *a.shape), *wanted.values()) for a in arrays.values())
    names = ", ".join(wanted) or "input"
    raise UsageError(
        f"the data holds several arrays ({shapes}), and the model {expected}",
        where=where,
        next_step="stack the samples on axis 0: torch.save(torch.stack(samples), 'x.pt')"
        if samples
        else f"name them {names}"
        if len(wanted) > 1
        else f"name the one that is the input {names!r}",
    )


def axes_fit(shape: Sequence[int], example: Tensor) -> bool:
    """Equally many axes, and equally many channels.

    Height, width and length may differ, and the length of a sequence of tokens: networks take many.
    """
    if len(shape) != example.dim():
        return False
    tokens = not example.is_floating_point()
    return len(shape) < 2 or tokens or shape[1] == example.shape[1]


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
