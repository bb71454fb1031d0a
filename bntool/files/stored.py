"""The tensors of a file of weights one at a time: described by headers, read when they are asked for."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.atomic import sha256_of
from bntool.files.detect import Kind, detect
from bntool.files.drafting import Drafts
from bntool.files.safetensors_files import (
    INDEX_SUFFIX,
    Header,
    layout,
    read_header,
    read_index,
    write_safetensors,
)
from bntool.files.security.containers import Container
from bntool.files.security.pickled_calls import shown
from bntool.files.security.pickles import open_weights
from bntool.files.security.stand_ins import Picture, PicturedTensor, pictured_tensors
from bntool.files.shards import write_shards
from bntool.files.targets import Target


@dataclasses.dataclass(frozen=True)
class Described:
    """A stored tensor: torch dtype (`float32`), shape, and the file of several that it lies in."""

    dtype: str
    shape: tuple[int, ...]
    shard: str = ""

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Mapping[str, Tensor]):
    """The weights of a file by name. `read` gives one tensor, in memory of its own."""

    path: Path
    tensors: Mapping[str, Described]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, Any]
    sharded: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is in."""
        shards = {described.shard for described in self.tensors.values()} if self.sharded else set()
        return (self.path, *(self.path.with_name(shard) for shard in sorted(shards)))

    @property
    def suffix(self) -> str:
        """How the name of a file ends that it is written to."""
        return INDEX_SUFFIX if self.sharded else ".safetensors"

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def write(self, output: Path, *, force: bool = False) -> str:
        """Write it as safetensors, in as many files, whole or not at all; return the sha256."""
        target = Target(force=force, reads=self.files)
        path = target.claim(output)
        with target.drafts() as drafts:
            return self.draft(path, drafts)

    def draft(self, path: Path, drafts: Drafts) -> str:
        """The same into the drafts of a claimed `path`, to be put into place with the other files."""
        if not self.sharded:
            draft = drafts.of(path)
            self._fill("", draft)
            return sha256_of(draft)
        parts = {name: described.shard for name, described in self.tensors.items()}
        sizes = {name: described.nbytes for name, described in self.tensors.items()}
        return write_shards(path, parts, sizes, self.metadata, self._fill, drafts)

    def _fill(self, shard: str, path: Path) -> None:
        """One of its files; tensors are read one after the other."""
        chosen = ((n, d) for n, d in self.tensors.items() if shard in ("", d.shard))
        entries = layout((name, described.dtype, described.shape) for name, described in chosen)
        metadata = {"format": "pt"} if self.sharded else dict(self.metadata)
        write_safetensors(path, entries, metadata, map(self.read, entries))


def in_memory(path: Path, weights: Mapping[str, Any]) -> Stored:
    """Weights that were read already; what else stands among them is left out."""
    tensors = {
        name: Described(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
    }
    return Stored(path, tensors, weights.__getitem__, {"format": "pt"})


def open_stored(path: Path, limit: Limit | None = None) -> Stored:
    """A state_dict of `torch.save`, a safetensors file, or a sharded one. No tensor is read.

    Raises `LoadError` for files of other kinds, and for what is damaged or hostile.
    """
    limit = limit or Limit(1 << 62)
    kind = detect(path)
    if kind.kind is Kind.SAFETENSORS:
        header = read_header(path, limit)
        return _of_headers(path, {path.name: header}, header.metadata)
    if kind.kind is Kind.SAFETENSORS_INDEX:
        index = read_index(path, limit)
        return _of_headers(path, index.shards, index.metadata, sharded=True)
    if kind.kind is Kind.TORCH_ZIP:
        with path.open("rb") as opened:
            container = open_weights(opened, path, limit)
            return _of_archive(path, container, os.fstat(opened.fileno()))
    raise LoadError(
        f"{path.name} is {kind.description}; weights are read one at a time from a state_dict or safetensors",
        where=str(path),
        next_step="fold it without --plan",
    )


def _of_headers(
    path: Path, headers: Mapping[str, Header], metadata: Mapping[str, Any], sharded: bool = False
) -> Stored:
    held = {name: shard for shard, header in headers.items() for name in header.entries}
    tensors = {
        name: Described(headers[shard].entries[name].torch_dtype, headers[shard].entries[name].shape, shard)
        for name, shard in held.items()
    }
    return Stored(path, tensors, lambda name: headers[held[name]].read(name), metadata, sharded)


def _of_archive(path: Path, container: Container, judged: os.stat_result) -> Stored:
    if container.sizes.get("byteorder") and container.read("byteorder") != b"little":
        raise _unfit(path, "was written on a machine of another byte order")
    picture = Picture(container.read("data.pkl")).read_all()
    found = {tensor.name: tensor for tensor in pictured_tensors(picture.value)}
    plain = isinstance(picture.value, dict) and found.keys() == picture.value.keys()
    if not plain:
        raise _unfit(path, "holds more than a plain state_dict, or one tensor under two names")
    for tensor in found.values():
        if tensor.flipped:
            raise _unfit(path, f"keeps {shown(tensor.name)} as its negative or conjugate")
    places = {t.storage: container.offset(f"data/{t.storage}") for t in found.values()}

    def read(name: str) -> Tensor:
        with path.open("rb") as file:
            if _changes(os.fstat(file.fileno())) != _changes(judged):
                raise _unfit(path, "has changed while it was read")
            return _read_part(path, file, found[name], places[found[name].storage])

    tensors = {name: Described(t.dtype, t.shape, path.name) for name, t in found.items()}
    return Stored(path, tensors, read, {"format": "pt"})


def _changes(file: os.stat_result) -> tuple[int, ...]:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def _read_part(path: Path, file: BinaryIO, tensor: PicturedTensor, place: int) -> Tensor:
    """The bytes from a tensor's first number to its last, and no others of its storage."""
    dtype = getattr(torch, tensor.dtype)
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    data = bytearray(span * dtype.itemsize)
    file.seek(place + tensor.offset * dtype.itemsize)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise _unfit(path, "is cut short")
    return torch.frombuffer(data, dtype=dtype).as_strided(tensor.shape, tensor.stride)


def _unfit(path: Path, why: str) -> LoadError:
    return LoadError(f"{path.name} {why}", where=str(path), next_step="fold it without --plan")
