"""Making files of torch's format byte by byte, for the tests: a small pickle assembler and a zip writer."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

EMPTY_TUPLE, EMPTY_DICT, EMPTY_LIST, NONE = b")", b"}", b"]", b"N"
REDUCE, NEWOBJ, BUILD, PERSISTENT = b"R", b"\x81", b"b", b"Q"
TRUE, FALSE = b"\x88", b"\x89"


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + raw


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def mapping(*pairs: tuple[bytes, bytes]) -> bytes:
    return EMPTY_DICT + b"(" + b"".join(k + v for k, v in pairs) + b"u"


def call(function: str, *args: bytes) -> bytes:
    return name(function) + tup(*args) + REDUCE


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def storage(key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return tup(text("storage"), name(kind), text(key), text("cpu"), number(numel)) + PERSISTENT


def tensor(of: bytes, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), offset: int = 0) -> bytes:
    shape = [tup(*map(number, numbers)) for numbers in (size, stride)]
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of, number(offset), *shape, FALSE, hooks)


def module(kind: str, *attributes: tuple[str, bytes]) -> bytes:
    """An nn.Module of class `kind` with empty registries and the attributes given."""
    names = ("_parameters", "_buffers", "_modules")
    state = [(text(n), EMPTY_DICT) for n in names] + [(text("training"), FALSE)]
    state += [(text(n), value) for n, value in attributes]
    return name(kind) + EMPTY_TUPLE + NEWOBJ + mapping(*state) + BUILD


def write_zip(path: Path, structure: bytes, *, data: bytes | None = b"\0" * 16, **extra: bytes) -> Path:
    members = [("data.pkl", structure), ("byteorder", b"little"), ("version", b"3\n")]
    members += [("data/0", data)] if data is not None else []
    members += [(n.replace("__", "/"), v) for n, v in extra.items()]
    return write_members(path, members)


def write_members(
    path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about doubled names, which some tests want
        for member, content in members:
            archive.writestr(f"archive/{member}", content)
    return path


def write_legacy(path: Path, structure: bytes, *, machine: bytes = b"", keys: bytes = b"") -> Path:
    """Magic, protocol version, machine, the object, storage keys; no storages."""
    import torch

    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    magic_and_protocol = buffer.getvalue()[: buffer.getvalue().index(b"}")].rpartition(b"\x80\x02")[0]
    rest = (machine or pickled(EMPTY_DICT)) + structure + (keys or pickled(EMPTY_LIST))
    path.write_bytes(magic_and_protocol + rest)
    return path
