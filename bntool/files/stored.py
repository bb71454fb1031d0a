"""The tensors of a file of weights one at a time: described by headers, read when they are asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.detect import Kind, detect
from bntool.files.safetensors_files import Header, read_header, read_index
from bntool.files.security.containers import Container
from bntool.files.security.pickled_calls import shown
from bntool.files.security.pickles import open_weights
from bntool.files.security.stand_ins import Picture, PicturedTensor, pictured_tensors


@dataclasses.dataclass(frozen=True)
class Described:
    """A stored tensor: torch dtype (`float32`), shape, and the file of several that it lies in."""

    dtype: str
    shape: tuple[int, ...]
    shard: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file of weights. `read` gives one tensor, in memory of its own."""

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
