"""Safetensors files by their headers: what is in them, checked, and any tensor read or written by itself.

The format: eight bytes with the header's length, the header as JSON (name -> dtype, shape, offsets), then
the data without gaps (https://github.com/huggingface/safetensors#format). No torch at import.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import LoadError
from bntool.core.limits import Limit
from bntool.files.regular import open_regular, read_text
from bntool.files.security.pickled_calls import shown

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
_METADATA = "__metadata__"
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}  # fmt: skip
_NAMES_OF_TORCH = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}
_BYTES = {
    name: 1 if name[:2] == "F8" or name == "BOOL" else int(name.strip("UIFBC")) // 8 for name in _TORCH_NAMES
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as safetensors writes it, its shape, and where its bytes lie in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> str:
        """`float32` for F32."""
        return _TORCH_NAMES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself. `start` is where its data begins, in bytes."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        import torch

        entry = self.entries[name]
        data = bytearray(entry.nbytes)
        with self.path.open("rb") as file:
            file.seek(self.start + entry.begin)
            if file.readinto(data) != entry.nbytes:
                raise _damaged(self.path, f"the data of {shown(name)} is cut short")
        dtype = getattr(torch, entry.torch_dtype)
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class Index:
    """A model in several safetensors files: which tensor lies in which of them."""

    path: Path
    shards: Mapping[str, Header]
    metadata: Mapping[str, Any]

    def headers(self) -> Iterator[tuple[str, Header]]:
        """Every tensor's name with the header of the file it lies in."""
        for header in self.shards.values():
            for name in header.entries:
                yield name, header


def read_header(path: Path, limit: Limit | None = None) -> Header:
    """The header of a safetensors file, every entry checked against the format and the file's size.

    Raises `LoadError` for a file that is damaged, or that asks for more than `limit`.
    """
    limit = limit or Limit()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, "it ends inside its header")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise _damaged(path, f"its header claims {length:,} bytes, and the file has {size:,}")
        limit.require(path.name, structure=length, where=str(path))
        raw = file.read(length)
    # Counted before any of it is made into objects.
    limit.require(path.name, tensors=raw.count(b'"data_offsets"'), structure=length, where=str(path))
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no plain JSON ({shown(str(error))})") from error
    if not isinstance(document, dict):
        raise _damaged(path, "its header is no table")
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ holds something other than texts")
    entries = {name: _entry(path, name, value) for name, value in document.items()}
    _require_no_gaps(path, entries, size - 8 - length)
    limit.require(path.name, data=size - 8 - length, tensors=len(entries), structure=length, where=str(path))
    return Header(path, entries, metadata, 8 + length)


def read_index(path: Path, limit: Limit | None = None) -> Index:
    """A sharded model by its index, every shard's header read and every tensor found where it is said to be.

    Raises `LoadError` for an index that is damaged, that leads out of its folder, or whose shards are not
    there.
    """
    limit = limit or Limit()
    limit.require(path.name, structure=path.stat().st_size, where=str(path))
    try:
        document = json.loads(read_text(path, limit.structure), object_pairs_hook=_once)
        places = document["weight_map"]
        metadata = document.get("metadata", {})
        plain = all(isinstance(n, str) and isinstance(f, str) for n, f in places.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"it is no index of safetensors files ({shown(str(error))})") from error
    if not plain or not places or not isinstance(metadata, dict):
        raise _damaged(path, "its weight_map does not name a file for every tensor")
    shards: dict[str, Header] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise LoadError(
                f"{path.name} was refused: it names a file outside its folder, {shown(file)}",
                where=str(path),
                next_step="put the shards beside the index, and name them without a folder",
            )
        shard = path.with_name(file)
        if not shard.is_file():
            raise LoadError(
                f"{path.name} needs {shown(file)}, which is not there",
                where=str(path),
                next_step="download every shard into the folder of the index",
            )
        shards[file] = read_header(shard, limit)
    held = {name: file for file, header in shards.items() for name in header.entries}
    wrong = [name for name in {**places, **held} if held.get(name) != places.get(name)]
    if wrong:
        raise _damaged(path, f"{shown(wrong[0])} is not in the file that the index names")
    if sum(len(header.entries) for header in shards.values()) != len(held):
        raise _damaged(path, "two of its files hold a tensor of the same name")
    limit.require(
        path.name,
        data=sum(entry.nbytes for header in shards.values() for entry in header.entries.values()),
        tensors=len(held),
        where=str(path),
    )
    return Index(path, shards, metadata)


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Places for tensors given as (name, torch dtype, shape), without gaps, in the order given."""
    entries: dict[str, Entry] = {}
    at = 0
    for name, torch_dtype, shape in tensors:
        dtype = _NAMES_OF_TORCH[torch_dtype]
        size = math.prod(shape) * _BYTES[dtype]
        entries[name] = Entry(dtype, tuple(shape), at, at + size)
        at += size
    return entries


def write_safetensors(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], tensors: Iterable[Tensor]
) -> None:
    """Write a file tensor by tensor: `tensors` in the order of `entries`, each let go before the next."""
    import torch

    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    document |= {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
        for name, e in entries.items()
    }
    header = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers that map the file want aligned data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for entry, tensor in zip(entries.values(), tensors, strict=True):
            if entry.nbytes:
                plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                file.write(plain.numpy().data)
            if file.tell() != 8 + len(header) + entry.end:
                raise ValueError("a tensor is not of the size that was announced")


def torch_name(tensor: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _entry(path: Path, name: str, value: Any) -> Entry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _damaged(path, f"{shown(name)} has the unknown dtype {shown(str(dtype))}")
    if not _numbers(shape) or not _numbers(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{shown(name)} is not described by a shape and two offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise _damaged(path, f"{shown(name)} has a shape and a size that do not agree")
    return Entry(dtype, tuple(shape), begin, end)


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _require_no_gaps(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _damaged(path, f"{shown(name)} does not begin where the tensor before it ends")
        at = entry.end
    if at != size:
        raise _damaged(path, f"its tensors take {at:,} bytes, and it holds {size:,}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _damaged(path: Path, why: str) -> LoadError:
    return LoadError(f"{path.name} is damaged: {why}", where=str(path), next_step="download or copy it again")
