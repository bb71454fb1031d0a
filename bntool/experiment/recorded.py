"""Labelled records: parquet, Hugging Face data sets, webdataset shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bntool.core.errors import UsageError
from bntool.data.choosing import ALL, Choice
from bntool.data.columns import Read, read_columns
from bntool.data.images import Preparation
from bntool.data.records import LABELS, Records, records_at
from bntool.experiment.parts import Images, decoded, of_parts, two_parts
from bntool.experiment.samples import Data, Samples, held


def recorded(path: Path, preparation: Preparation, choice: Choice) -> Data:
    """Training and test data of what lies at `path`; where it has no part for the test a fifth is held out.

    Raises `UsageError` without a column of labels, or with classes that the training has not.
    """
    parts = [_part(records, choice, preparation) for records in _places(path, choice.split)]
    reads = [read for _, read in parts]
    numbers = {label: number for number, label in enumerate(_classes(reads[0], str(path)))}
    odd = sorted({str(label) for label in reads[-1].labels.values() if label not in numbers})
    if odd:
        raise UsageError(f"the test samples have other classes: {', '.join(odd[:5])}", where=str(path))
    labels = [torch.tensor([numbers[label] for label in read.labels.values()]) for read in reads]
    samples = [
        _samples(read, numbered, preparation, str(path)) for read, numbered in zip(reads, labels, strict=True)
    ]
    notes = [note for note, _ in parts]
    return of_parts(samples, labels, len(numbers), path, notes, choice.seed)


def _places(path: Path, split: str | None) -> list[Records]:
    """The training and the test part; all as one where there is no part for the test."""
    if split is not None:
        names: list[str | None] = [*two_parts(split, str(path))]
    else:
        whole = records_at(path, ALL, str(path))
        assert whole is not None  # the caller looked
        tests = [name for name in ("test", "val") if name in whole.parts]
        if "train" not in whole.parts or not tests:
            return [whole]
        names = [None, tests[0]]
    return [found for name in names if (found := records_at(path, name, str(path))) is not None]


def _part(records: Records, choice: Choice, preparation: Preparation) -> tuple[str, Read]:
    if records.label_column(choice.columns) is None:
        raise UsageError(
            f"no column holds the labels: the data holds {', '.join(records.columns)}",
            where=records.where,
            next_step=f"name both, as --columns INPUT,LABEL; {', '.join(LABELS[:5])} are found by themselves",
        )
    read = read_columns(records, choice.columns, range(records.length), preparation)
    return f"{records.length} samples of {records.what}, {records.where}{read.told}", read


def _classes(read: Read, where: str) -> list[Any]:
    found = set(read.labels.values())
    if not all(isinstance(label, int | str) for label in found) or len({type(one) for one in found}) > 1:
        kinds = ", ".join(sorted({type(label).__name__ for label in found}))
        raise UsageError(
            f"the labels are of type {kinds}",
            where=where,
            next_step="give each sample a whole number or a name",
        )
    return sorted(found)


def _samples(read: Read, labels: Tensor, preparation: Preparation, where: str) -> Samples:
    if len(read.inputs) != 1:
        names = ", ".join(column.name for column in read.inputs)
        raise UsageError(f"compare trains models of one input, and there are {names}", where=where)
    (column,) = read.inputs
    if column.images:
        return decoded(Images(list(column.held.values()), labels.tolist(), preparation))
    return held(column.tensor(list(column.held), where), labels, where)
