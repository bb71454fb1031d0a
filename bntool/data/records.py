"""Samples in named columns: parquet files, Hugging Face data sets and webdataset shards.

Each is read by the library whose format it is, from this disk alone, and nothing in it is run: what lies in a
column is a number, a text, an array of numbers, or an image that Pillow decodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bntool.core.errors import BntoolError, LoadError, UsageError
from bntool.data.choosing import ALL, listed, part_named
from bntool.data.images import ENDINGS, Encoded
from bntool.files.numpy_files import array_in

LABELS = ("label", "labels", "cls", "class", "target", "targets", "y", "fine_label")
"""The names that people give the column of labels."""
_EXTRAS = {"parquet": "pyarrow", "Hugging Face": "datasets", "webdataset": "webdataset"}


@dataclasses.dataclass(frozen=True)
class Records:
    """Samples by number, in named columns.

    Args:
        where: the file or folder, as it was given.
        what: the format and how many files of it there are, in words.
        columns: their names.
        length: how many samples there are.
        read: the values of some columns in samples of these numbers, which rise.
        parts: all parts of the data, `train`, `test`, `val`; None for files that are of none.
    """

    where: str
    what: str
    columns: tuple[str, ...]
    length: int
    read: Callable[[Sequence[str], Sequence[int]], list[dict[str, Any]]]
    parts: frozenset[str | None]

    def values(self, columns: Sequence[str], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Images, arrays, numbers or texts of these samples, in rising order, by column.

        Raises `UsageError` for a column that is not there, `LoadError` for what cannot be read.
        """
        for column in columns:
            if column not in self.columns:
                raise self.no_column(f"there is no column {column}")
        with _reading(self.where):
            rows = self.read(columns, sorted(numbers))
        return {column: [row[column] for row in rows] for column in columns}

    def no_column(self, what: str) -> UsageError:
        """The error of a column that is not known, with those that there are."""
        likely = [name for name in self.columns if name not in LABELS] or ["INPUT"]
        return UsageError(
            f"{what}: the data holds {listed(self.columns) or 'no column'}",
            where=self.where,
            next_step=f"name the input's column: --columns {likely[0]}",
        )

    def label_column(self, named: Sequence[str]) -> str | None:
        """That of the labels: the second of those named, else one of `LABELS`; None where there is none."""
        if len(named) > 1:
            return named[1]
        return next((name for name in LABELS if name in self.columns and name not in named), None)


def records_at(path: Path, split: str | None, where: str) -> Records | None:
    """The samples of a part of what lies there; None for anything but these formats.

    Raises:
        LoadError: the library of the format is not installed, or it cannot read what lies there.
        UsageError: there is no such part.
    """
    for holds, opened in ((_is_saved, _saved), (_is_parquet, _parquet), (_is_shards, _shards)):
        if holds(path):
            with _reading(where):
                return opened(path, split, where)
    return None


def are_records(path: Path) -> bool:
    """Whether `records_at` reads what lies there."""
    return any(holds(path) for holds in (_is_saved, _is_parquet, _is_shards))


# -- formats -------------------------------------------------------------------------------------------------


def _is_saved(path: Path) -> bool:
    """Whether it is a folder of `Dataset.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _is_parquet(path: Path) -> bool:
    return _holds(path, ".parquet")


def _is_shards(path: Path) -> bool:
    return _holds(path, ".tar")


def _holds(path: Path, ending: str) -> bool:
    """A file that ends so; or a folder with such files, and without images in files of their own."""
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() == ending
    endings = {file.suffix.lower() for file in path.rglob("*")}
    return ending in endings and not endings & ENDINGS


def _saved(path: Path, split: str | None, where: str) -> Records:
    library = _library("Hugging Face", where)
    found = library.load_from_disk(str(path.absolute()))
    parts = dict(found) if isinstance(found, dict) else {"": found}
    wanted = _chosen({name: part_named(name) for name in parts}, split, where)
    whole = library.concatenate_datasets([parts[name] for name in wanted])

    def read(columns: Sequence[str], numbers: Sequence[int]) -> list[dict[str, Any]]:
        return _rows(whole.select_columns(list(columns)).with_format("arrow")[list(numbers)], numbers)

    inside = f" ({', '.join(wanted)})" if wanted != [""] else ""
    return Records(
        where,
        f"a Hugging Face data set{inside}",
        tuple(whole.column_names),
        len(whole),
        read,
        frozenset(map(part_named, parts)),
    )


def _parquet(path: Path, split: str | None, where: str) -> Records:
    _library("parquet", where)
    dataset = importlib.import_module("pyarrow.dataset")
    parts = _parts(path, ".parquet")
    files = _chosen(parts, split, where)
    whole = dataset.dataset([str(file.absolute()) for file in files], format="parquet")

    def read(columns: Sequence[str], numbers: Sequence[int]) -> list[dict[str, Any]]:
        return _rows(whole.to_table(columns=list(columns)).take(list(numbers)), numbers)

    return Records(
        where,
        _counted(files, "parquet file"),
        tuple(whole.schema.names),
        whole.count_rows(),
        read,
        frozenset(parts.values()),
    )


def _shards(path: Path, split: str | None, where: str) -> Records:
    _library("webdataset", where)
    iterators = importlib.import_module("webdataset.tariterators")
    parts = _parts(path, ".tar")
    files = _chosen(parts, split, where)

    def samples() -> Iterator[dict[str, Any]]:
        for file in files:  # opened here: webdataset takes names such as pipe: for commands
            with file.open("rb") as stream:
                held = iterators.tar_file_expander([{"url": str(file), "stream": stream}])
                yield from iterators.group_by_keys(held)

    def read(columns: Sequence[str], numbers: Sequence[int]) -> list[dict[str, Any]]:
        wanted, last = set(numbers), max(numbers, default=-1)
        rows = []
        for number, sample in enumerate(itertools.islice(samples(), last + 1)):
            if number in wanted:
                rows.append({name: _of_member(sample, name, where) for name in columns})
        return rows

    columns = tuple(_names(next(samples(), {})))
    return Records(
        where,
        _counted(files, "webdataset shard"),
        columns,
        sum(1 for _ in samples()),
        read,
        frozenset(parts.values()),
    )


def _names(sample: dict[str, Any]) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


# -- parts ---------------------------------------------------------------------------------------------------


def _parts(path: Path, ending: str) -> dict[Any, str | None]:
    """The files of an ending, each with its part by the first word of its name or folder that is one."""
    if path.is_file():
        return {path: None}
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() == ending and file.is_file())
    words = {file: re.split(r"[^A-Za-z]+", file.relative_to(path).as_posix()) for file in found}
    return {file: next((p for word in words[file] if (p := part_named(word))), None) for file in found}


def _chosen(parts: dict[Any, str | None], split: str | None, where: str) -> list[Any]:
    """Those of a part: of `split`, or of the training where there are parts."""
    if split == ALL or (split is None and "train" not in parts.values()):
        return list(parts)
    wanted = part_named(split or "train")
    found = [name for name in parts if name == split or (wanted is not None and parts[name] == wanted)]
    if not found:
        names = [name if isinstance(name, str) else name.name for name in parts]
        raise UsageError(
            f"there is no part {split} in {where}",
            where=f"it holds {listed(name for name in names if name) or 'one part, without a name'}",
            next_step=f"leave --split out, or --split {ALL}",
        )
    return found


# -- values --------------------------------------------------------------------------------------------------


def _rows(table: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of an Arrow table, one by one: lists of numbers take many times the room of arrays."""
    names = table.column_names
    return [
        {
            name: _of_cell(value.as_py(), f"{name} of sample {number}")
            for name, value in zip(names, row, strict=True)
        }
        for number, row in zip(numbers, zip(*(table[name] for name in names), strict=True), strict=True)
    ]


def _of_cell(held: Any, name: str) -> Any:
    if isinstance(held, dict) and {"bytes", "path"} <= held.keys():  # an image of Hugging Face's
        content = held["bytes"]
        return Encoded(name, Path(held["path"]).read_bytes() if content is None else content)
    if isinstance(held, bytes):
        return Encoded(name, held)
    return np.asarray(held) if isinstance(held, list) else held


def _of_member(sample: dict[str, Any], name: str, where: str) -> Any:
    """What lies in a file of a shard, by its ending."""
    key, ending = sample["__key__"], name.rpartition(".")[2]
    if name not in sample:
        raise UsageError(
            f"the sample {key} has no {name}: it holds {listed(_names(sample))}",
            where=where,
            next_step="name a column that every sample has: --columns INPUT",
        )
    content = sample[name]
    if f".{ending}" in ENDINGS:
        return Encoded(f"{key}.{name}", content)
    if ending == "npy":
        return array_in(content)
    if ending in ("cls", "txt", "id", "index"):
        text = content.decode("utf-8").strip()
        return int(text) if text.removeprefix("-").isdecimal() else text
    return content


# -- reading -------------------------------------------------------------------------------------------------


def _counted(files: Sequence[Path], what: str) -> str:
    return f"{len(files)} {what}{'s' * (len(files) != 1)}"


def _library(format_name: str, where: str) -> Any:
    package = _EXTRAS[format_name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LoadError(
            f"reading {format_name} data needs {package}, which is not installed",
            where=where,
            next_step=f"pip install {package}",
        ) from error


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever a library raises over damaged data is one error."""
    try:
        yield
    except BntoolError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"cannot read the data: {lines[0][:200]}", where=where, next_step="write or copy it again"
        ) from error
