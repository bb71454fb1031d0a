"""The data of an ONNX file that stand in other files: judged before they are read, and named when written."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import math
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
from bntool.files.drafting import Drafts
from bntool.files.security.pickled_calls import shown

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


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with where a tensor is said to be: words that follow the file's name, and a way out.

    `suspicious` is what no honest file says; the rest happens to files that are copied without their data.
    `cut` is a suspicious place that begins in the data: a download that ended early looks so too.
    """

    what: str
    next_step: str
    suspicious: bool = False
    cut: bool = False


def require_data(path: Path, tensor: onnx.TensorProto) -> Path:
    """The file that holds a tensor; it must stand in the model's folder and be long enough."""
    fault = fault_of(path, tensor)
    if fault is not None:
        raise LoadError(f"{path.name} {fault.what}", where=str(path), next_step=fault.next_step)
    return path.parent / str(ExternalDataInfo(tensor).location)


def fault_of(path: Path, tensor: onnx.TensorProto) -> Fault | None:
    """What is wrong with a tensor's place outside the file, in the words of every command; None: nothing."""
    name, again = shown(tensor.name), "export it again"
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        return Fault(f"takes {name} from a place that is no number: {first_line(error)}", again, True)
    # A text that is not UTF-8 comes out of protobuf as bytes.
    if not isinstance(info.location, str) or not _stays_inside(info.location):
        where = shown(str(info.location))
        return Fault(f"takes {name} from a file outside its folder: {where}", again, True)
    data, text, quoted = path.parent / info.location, shown(info.location), shlex.quote(info.location)
    if not _belongs(data, path):
        return Fault(
            f"takes {name} through a link out of its folder: {text}", "copy the data beside it", True
        )
    if not data.is_file():
        return Fault(f"takes {name} from a file that is not there: {text}", f"put {text} beside it")
    # ONNX's libraries will not read it: the other name may be that of a file elsewhere.
    if data.stat().st_nlink > 1:
        step = f"cd {shlex.quote(str(path.parent))} && cp {quoted} {quoted}.own && mv {quoted}.own {quoted}"
        return Fault(f"takes {name} from a file that has a second name (a hard link): {text}", step)
    held, begin = data.stat().st_size, info.offset or 0
    needed = _bytes_of(tensor) if info.length is None else info.length
    if begin < 0 or begin + needed > held:
        what = f"{text}, which has {held:,} bytes; it ends at {begin + needed:,}"
        step = "download or copy the data again"
        return Fault(f"takes {name} from beyond the end of {what}", step, True, begin >= 0)
    if needed != _bytes_of(tensor):
        what = f"{needed:,} bytes of {text}, and takes {_bytes_of(tensor):,}"
        return Fault(f"gives {name} {what}, or from beyond the end", "download or export it again", True)
    return None


def _stays_inside(location: str) -> bool:
    return bool(location) and all(
        not pure.is_absolute() and not pure.drive and ".." not in pure.parts
        for pure in (PurePosixPath(location), PureWindowsPath(location))
    )


def _belongs(data: Path, path: Path) -> bool:
    """Whether the data lie in the model's folder, or in that of the file which the model is a link to.

    The cache of a model hub is made of such: model and data are links into one folder.
    """
    real = Path(os.path.realpath(data))
    folders = {os.path.realpath(path.parent), str(Path(os.path.realpath(path)).parent)}
    return any(real.is_relative_to(folder) for folder in folders)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    try:
        return int(ir.DataType(tensor.data_type).itemsize * math.prod(tensor.dims) + 0.999)
    except (TypeError, ValueError):
        return 0


def whole_proto(path: str | Path) -> onnx.ModelProto:
    """The model with all its numbers; those in files beside it are read by bntool's own rule for them."""
    path = Path(path)
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    for tensor in external_tensors(proto):
        info = ExternalDataInfo(tensor)
        with require_data(path, tensor).open("rb") as file:
            file.seek(info.offset or 0)
            tensor.raw_data = file.read(_bytes_of(tensor) if info.length is None else info.length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return proto


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
    data_name = f"{path.name}{_DATA}"
    if not path.is_file() or not any(path.parent.glob(f"{glob.escape(data_name)}*")):
        return []  # without a look into the model, which may be large
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        locations = {ExternalDataInfo(tensor).location for tensor in external_tensors(proto)}
    except (DecodeError, OSError, ValueError, TypeError):
        return []
    said = next((entry.value for entry in proto.metadata_props if entry.key == _OWN), "")
    data = path.with_name(data_name)
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
