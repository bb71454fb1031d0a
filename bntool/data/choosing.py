"""Which samples of the data are used, and in what order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from bntool.core.errors import UsageError

ALL = "all"
_PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PARTS |= dict.fromkeys(("val", "valid", "validation"), "val")
_SHOWN = 8
_MEANT_FOR = {
    "split": "a folder, an .npz, or records with parts",
    "include": "a folder of images",
    "columns": "parquet, a Hugging Face data set, or webdataset shards",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which samples, and in what order.

    Args:
        batch_size: samples in a batch.
        batches: at most so many batches.
        samples: at most so many samples, drawn where the data is shuffled.
        shuffle: whether data that lies in an order is drawn by `seed`. Folders and files often hold one class
            after the other, and batches of one class have statistics that no batch in training has.
        seed: of that order.
        split: the part of the data, `train`, `val`, …; `all` of them; None for `train` where there are parts.
        include: patterns for the paths of files below the folder, or for their names.
        columns: of records: the input's, and the labels'; found by themselves where it is empty.
        share: (rank, size) of one of several processes: of the batches it takes every size-th from rank on.
    """

    batch_size: int = 32
    batches: int | None = None
    samples: int | None = None
    shuffle: bool = True
    seed: int = 0
    split: str | None = None
    include: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        """Raise `UsageError` for a size below 1."""
        for name in ("batch_size", "batches", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                words = name.replace("_", " ") if name == "batch_size" else f"number of {name}"
                raise UsageError(f"the {words} is {value}", next_step="it must be at least 1")

    def order(self, length: int) -> list[int]:
        """The numbers of the samples that are used, of `length`."""
        numbers = torch.arange(length)
        if self.shuffle:
            numbers = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed))
        chosen: list[int] = numbers[: self.samples].tolist()
        return chosen

    def parts(self, order: Sequence[int], where: str = "") -> list[list[int]]:
        """The numbers of the samples of each batch of this process, in the order in which they lie.

        A last batch of one joins the one before: by itself it has no variance.
        """
        if not order:
            raise UsageError("the data holds no sample", where=where, next_step="samples lie on axis 0")
        starts = list(range(0, len(order), self.batch_size))
        if self.batch_size > 1 and len(starts) > 1 and len(order) - starts[-1] == 1:
            starts.pop()
        bounds = zip(starts, [*starts[1:], len(order)], strict=True)
        rank, size = self.share
        return [sorted(order[start:stop]) for start, stop in bounds][rank : self.batches : size]

    def require_unused(self, where: str, *names: str) -> None:
        """Raise `UsageError` where what other data alone has was asked of this."""
        for name in names:
            if getattr(self, name):
                raise UsageError(
                    f"{name} is for {_MEANT_FOR[name]}",
                    where=where,
                    next_step=f"leave {name} out, and choose in the loader or in the file itself",
                )


def part_named(name: str) -> str | None:
    """`train`, `test` or `val`, by the names that people give them; None for any other name."""
    return _PARTS.get(name.lower())


def part_of(folder: Path, split: str | None) -> Path:
    """The folder of a part of the data: of `split`, or of the training where there are parts.

    A class may be called `train`; it is a part only beside another one. Raises `UsageError` for a split that
    is not there.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = [path for path in inside if part_named(path.name)]
    if split == ALL:
        return folder
    if split is None:
        training = [path for path in parts if part_named(path.name) == "train"]
        return training[0] if training and len(parts) > 1 else folder
    fitting = [path for path in inside if path.name == split]
    fitting += [path for path in parts if part_named(path.name) == part_named(split)]
    if not fitting:
        raise UsageError(
            f"there is no part {split} in {folder}",
            where=f"it holds {listed(path.name for path in inside) or 'no folder'}",
            next_step=f"name one of its folders, or {ALL}; or leave --split out",
        )
    return fitting[0]


def included(files: Sequence[Path], folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Those files whose path below `folder`, whose name or a folder of whose path one of `patterns` fits.

    All for no pattern. Raises `UsageError` where none fits.
    """
    if not patterns:
        return list(files)

    def texts(file: Path) -> list[str]:
        path = file.relative_to(folder)
        return [file.name, *(one.as_posix() for one in (path, *path.parents[:-1]))]

    meant = [pattern.rstrip("/") for pattern in patterns]
    found = [f for f in files if any(fnmatchcase(text, one) for text in texts(f) for one in meant)]
    if not found:
        raise UsageError(
            f"none of {len(files)} files in {folder} fits {', '.join(patterns)}",
            where=f"such as {files[0].relative_to(folder).as_posix()}",
            next_step="a pattern is for a folder, a path below, or a name: dogs, 'dogs/*', '*.png'; "
            "give the option again for several",
        )
    return found


def told(used: Sequence[Path], found: int, folder: Path) -> str:
    """How many files of which folders are used, in words."""
    held = Counter(kind_of(path, folder) for path in used)
    of = "" if len(used) == found else f" of {found}"
    inside = f"in {folder}"
    if len(held) > 1:
        names = listed(f"{name or '.'} ({number})" for name, number in sorted(held.items()))
        inside = f"in {len(held)} folders of {folder}: {names}"
    elif any(held):
        inside = f"in {folder / next(iter(held))}"
    return f"{len(used)}{of} images {inside}"


def kind_of(file: Path, folder: Path) -> str:
    """The folder of its class: the first one below `folder`; empty for a file that lies in none."""
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    all_names = list(names)
    more = len(all_names) - _SHOWN
    return ", ".join(all_names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
