"""The data of an ONNX file that stand in other files: judged before they are read, and named when written."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo

from bntool.core.errors import LoadError
from bntool.files.targets import Drafts

_DATA = ".data"
_OWN = "bntool_data"
_MOST_DATA_FILES = 1000


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    nodes = [node for function in proto.functions for node in function.node]
    graphs = [proto.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes += graph.node
            yield from (t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
            continue
        for attribute in nodes.pop().attribute:
            graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            tensors = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
            yield from (t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL)


def require_data(path: Path, tensor: onnx.TensorProto) -> Path:
    """The file that holds a tensor; it must stand in the model's folder and be long enough."""
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise LoadError(
            f"the external data of {tensor.name} is described wrongly: {first_line(error)}",
            where=str(path),
            next_step="export it again",
        ) from error
    # A text that is not UTF-8 comes out of protobuf as bytes.
    inside = (
        isinstance(info.location, str)
        and info.location
        and all(
            not pure.is_absolute() and not pure.drive and ".." not in pure.parts
            for pure in (PurePosixPath(info.location), PureWindowsPath(info.location))
        )
    )
    if not inside:
        raise LoadError(
            f"the weight {tensor.name} is said to be in {info.location!r}, outside the model's folder",
            where=str(path),
            next_step="move the data beside the model and export it again",
        )
    data, name = path.parent / info.location, shlex.quote(info.location)
    if not Path(os.path.realpath(data)).is_relative_to(os.path.realpath(path.parent)):
        raise LoadError(
            f"{info.location}, which holds the weight {tensor.name}, is a link out of the model's folder",
            where=str(path),
            next_step="copy the data beside the model",
        )
    if not data.is_file():
        raise LoadError(
            f"the weight {tensor.name} is in {info.location}, which is not there",
            where=str(path),
            next_step=f"put {info.location} beside the model",
        )
    # ONNX's libraries will not read it: the other name may be that of a file elsewhere.
    if data.stat().st_nlink > 1:
        raise LoadError(
            f"{info.location}, which holds the weight {tensor.name}, has a second name (a hard link)",
            where=str(path),
            next_step=f"cd {shlex.quote(str(path.parent))} && cp {name} {name}.own && mv {name}.own {name}",
        )
    end = (info.offset or 0) + (info.length or 0)
    if data.stat().st_size < end:
        raise LoadError(
            f"{info.location} has {data.stat().st_size:,} bytes; the weight {tensor.name} ends at {end:,}",
            where=str(path),
            next_step="download or copy it again",
        )
    return data


def require_numbers(path: Path, tensor: Any) -> None:
    """The tensor's type is known; the bytes it is said to take are those of its shape, and are there."""
    if tensor.dtype == ir.DataType.STRING:
        return
    if not isinstance(tensor, ir.ExternalTensor):
        tensor.numpy()  # a view of the bytes, which raises where they are more or fewer
        return
    held = (path.parent / str(tensor.location)).stat().st_size
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes or (tensor.offset or 0) + length > held:
        raise LoadError(
            f"the weight {tensor.name} needs {tensor.nbytes:,} bytes; {tensor.location} holds {held:,}, and "
            f"{length:,} are said to be its own from {tensor.offset or 0:,} on",
            where=str(path),
            next_step="download or export it again, with its data",
        )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def add_data(path: Path, draft: Path, data: Path | None, drafts: Drafts) -> None:
    """Have the data of a model's draft go beside it, under the first free of its names.

    They are NAME.onnx.data, NAME.onnx.data.1, and so on. So the model that stands there stays whole until the
    new one, which names another file, takes its place in one step. The data of the old one goes then, if
    bntool wrote it for this model and nothing else reads it.
    """
    drafts.retire(lambda: _own_data(path))
    if data is not None:
        drafts.add_part(path, data, _data_names(path), lambda name: _rename_data(draft, data, name))


def _data_names(path: Path) -> Iterator[str]:
    first = f"{path.name}{_DATA}"
    return itertools.chain((first,), (f"{first}.{n}" for n in range(1, _MOST_DATA_FILES)))


def _own_data(path: Path) -> list[Path]:
    """The data file of the model at `path`, where bntool wrote both: the model says so."""
    if not path.is_file():
        return []
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        locations = {ExternalDataInfo(tensor).location for tensor in external_tensors(proto)}
    except (DecodeError, OSError, ValueError, TypeError):
        return []
    said = next((entry.value for entry in proto.metadata_props if entry.key == _OWN), "")
    data = path.with_name(f"{path.name}{_DATA}")
    own = [data.with_name(n) for n in locations if n == data.name or n.startswith(f"{data.name}.")]
    return [data for data in own if said == _told(data)]


def _told(data: Path) -> str:
    """What a model of bntool's says of its data file: enough to know it again."""
    return f"{data.name} {data.stat().st_size}" if data.is_file() else "-"


def _rename_data(path: Path, data: Path, name: str) -> None:
    """Have the model at `path` name its data `name`, and say that the file is bntool's own."""
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    for tensor in external_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    kept = [entry for entry in proto.metadata_props if entry.key != _OWN]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=_OWN, value=f"{name} {data.stat().st_size}")
    path.write_bytes(proto.SerializeToString())
