"""Which columns of records are the model's inputs, and those columns as tensors."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bntool.core.errors import UsageError
from bntool.data.arrays import axes_fit, tensor_of
from bntool.data.choosing import listed
from bntool.data.images import Encoded, Preparation, converted, image_batch
from bntool.data.records import Records
from bntool.graph.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Column:
    """A column in memory: its values by the number of the sample, images as they are encoded."""

    name: str
    held: dict[int, Any]
    preparation: Preparation

    @property
    def images(self) -> list[Encoded]:
        """Its images; none where it holds numbers."""
        return [value for value in self.held.values() if isinstance(value, Encoded)]

    def tensor(self, numbers: Sequence[int], where: str) -> Tensor:
        """Those samples as a batch. Raises `UsageError` for what is no number, and for mixed sizes."""
        values = [self.held[number] for number in numbers]
        if self.images:
            return image_batch(values, self.preparation)
        arrays = [np.asarray(value) for value in values]
        odd = next((array for array in arrays if array.shape != arrays[0].shape), None)
        if odd is not None or arrays[0].dtype.kind not in "biuf":
            held = f"sizes {arrays[0].shape} and {odd.shape}" if odd is not None else f"{arrays[0].dtype}"
            raise UsageError(
                f"the column {self.name} holds {held}, of which no batch can be made",
                where=where,
                next_step="name another column: --columns INPUT",
            )
        return tensor_of(np.stack(arrays), where)


def input_columns(records: Records, named: Sequence[str], like: Inputs | None) -> list[str]:
    """The columns that are the model's inputs: those named, named like its inputs, or the one that can be.

    Raises `UsageError` with the columns that there are where that is not one.
    """
    if named:
        return [named[0]]
    wanted = list(like.tensors()) if like is not None else []
    if wanted and set(wanted) <= set(records.columns):
        return wanted
    first = {name: held[0] for name, held in records.values(records.columns, [0]).items()}
    images = [name for name, value in first.items() if isinstance(value, Encoded)]
    example = next(iter(like.tensors().values())) if like is not None and len(wanted) == 1 else None
    arrays = [
        name
        for name, value in first.items()
        if isinstance(value, np.ndarray)
        and value.dtype.kind in "biuf"
        and (example is None or axes_fit((1, *value.shape), example))
    ]
    found = images or arrays
    if len(found) != 1 or len(wanted) > 1:
        takes = f" ({like.shapes()})" if like is not None else ""
        raise records.no_column(f"it is not clear which column is the model's input{takes}")
    return found


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read of some samples: the inputs by column, labels where there are some, and both in words."""

    inputs: list[Column]
    labels: dict[int, Any]
    told: str

    @property
    def images(self) -> bool:
        """Whether the model's input is made of images."""
        return any(column.images for column in self.inputs)


def read_columns(
    records: Records, named: Sequence[str], numbers: Sequence[int], preparation: Preparation
) -> Read:
    """The inputs and labels of samples of these numbers. `UsageError` for what cannot be the input."""
    names = input_columns(records, named, preparation.like)
    label = records.label_column(named)
    ordered = sorted(numbers)
    values = records.values([*names, *([label] if label else [])], ordered)
    columns = [Column(name, dict(zip(ordered, values[name], strict=True)), preparation) for name in names]
    told = f": {', '.join(names)}"
    if any(column.images for column in columns):
        preparation.checked(records.where)
        told += _converted(columns[0].images, preparation)
    else:
        preparation.require_unused(records.where)
    labels = dict(zip(ordered, values[label], strict=True)) if label else {}
    if labels:
        counts = Counter(str(value) for value in labels.values())
        told += f"; {label} " + listed(f"{name} ({n})" for name, n in sorted(counts.items()))
    return Read(columns, labels, told)


def _converted(images: Sequence[Encoded], preparation: Preparation) -> str:
    said = converted(images, preparation.size[0])
    return f" ({said})" if said else ""
