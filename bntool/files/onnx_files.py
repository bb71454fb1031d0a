"""Open and save ONNX files: names, metadata and order are kept, and external data stays external."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo

from bntool.core.errors import InvariantError, LoadError
from bntool.files.detect import Kind, detect
from bntool.files.drafting import Drafts
from bntool.files.targets import Target

SINGLE_FILE_LIMIT = int(1.8 * 2**30)
"""A protobuf message ends at 2 GiB; the graph itself and the names need room beside the weights."""
_DATA = ".data"
_OWN = "bntool_data"
_MOST_DATA_FILES = 1000
_SMALL = 1024
"""Tensors of fewer bytes stay inside the file when a large model is split in two."""


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """An ONNX file in memory; tensors in external data are read only when they are asked for.

    `external` names the initializers whose numbers stand in other files, `data_files` those files.
    """

    path: Path
    model: ir.Model
    external: frozenset[str] = frozenset()
    data_files: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is in."""
        return (self.path, *self.data_files)


def open_onnx(path: str | Path) -> OnnxFile:
    """Read and check an ONNX file.

    Raises:
        LoadError: it is missing, damaged, not ONNX, not valid (cyclic, twice the same name, …), or its
            external data is missing, cut short, or outside its folder.
    """
    path = Path(path)
    found = detect(path)
    if found.kind is not Kind.ONNX:
        raise LoadError(f"{path} is {found.description}, not an ONNX model", next_step="name a .onnx file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, OSError) as error:
        raise LoadError(
            f"the file is damaged: {_first_line(error)}",
            where=str(path),
            next_step="download or export it again",
        ) from error
    try:
        data_files = dict.fromkeys(_require_data(path, tensor) for tensor in _external_tensors(proto))
        check_structure(proto)
        model = ir.from_proto(proto)
        for _, tensor, _ in _slots(model):
            _require_numbers(path, tensor)
    except LoadError:
        raise
    except Exception as error:  # any type can come out of a damaged file
        raise LoadError(
            f"the file is not valid ONNX: {_first_line(error)}", where=str(path), next_step="export it again"
        ) from error
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.parent)
    external = [
        name for name, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    return OnnxFile(path, model, frozenset(external), tuple(data_files))


def save_onnx(file: OnnxFile, output: str | Path, *, force: bool = False) -> tuple[Path, Path | None]:
    """Write the model; what was external goes to one file beside the output (`write_drafts`).

    A model too large for a single file is split alike. Returns the paths of both files.

    Raises:
        UsageError: the output exists without `force`, is an input, or cannot be written.
    """
    target = Target(force=force, reads=file.files)
    path = target.claim(output)
    with target.drafts() as drafts:
        write_drafts(file, path, drafts)
    return path, drafts.part_of(path)


def write_drafts(file: OnnxFile, path: Path, drafts: Drafts) -> tuple[Path, Path | None]:
    """Write drafts of the model for a claimed `path`, and of its data; the paths of both drafts."""
    draft = drafts.of(path)
    moving = _to_move(file)
    _write(file.model, draft, moving)
    _require_valid(draft)
    data = draft.with_name(f"{draft.name}.data") if moving else None
    add_data(path, draft, data, drafts)
    return draft, data


def _to_move(file: OnnxFile) -> list[tuple[Any, Callable[[Any], None]]]:
    """Every tensor that goes to the data file, and how to put another in its place."""
    slots = list(_slots(file.model))
    inline = sum(t.nbytes for _, t, _ in slots if not isinstance(t, ir.ExternalTensor))
    large = inline > SINGLE_FILE_LIMIT

    def moves(name: str, tensor: Any) -> bool:
        was_outside = isinstance(tensor, ir.ExternalTensor) or name in file.external
        return was_outside or (large and bool(tensor.nbytes >= _SMALL))

    return [(tensor, put) for name, tensor, put in slots if moves(name, tensor)]


def _slots(model: ir.Model) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Every tensor of the model: the initializer's name in the main graph, the tensor, a setter."""
    for graph in (*model.graphs(), *(f.graph for f in model.functions.values())):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                at_top = name if graph is model.graph else ""
                yield at_top, value.const_value, functools.partial(setattr, value, "const_value")
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():

                    def put(t: Any, node: ir.Node = node, name: str = name) -> None:
                        node.attributes[name] = ir.AttrTensor(name, t)

                    yield "", attribute.as_tensor(), put


def _write(model: ir.Model, draft: Path, moving: list[tuple[Any, Callable[[Any], None]]]) -> None:
    """Write the model and its data; the model in memory is afterwards what it was."""
    try:
        if moving:
            moved = ir.external_data.convert_tensors_to_external(
                [tensor for tensor, _ in moving], draft.parent, f"{draft.name}.data"
            )
            for (_, put), tensor in zip(moving, moved, strict=True):
                put(tensor)
        ir.save(model, draft, format="protobuf")
    finally:
        for tensor, put in moving:
            put(tensor)


def check_structure(proto: onnx.ModelProto) -> None:
    """ONNX's own check of everything but data outside the file, whose place is checked before it is read.

    An output needs no shape: runtimes take it without one. The proto is afterwards what it was. Raises
    `ValidationError`.
    """
    told = [info.type.tensor_type for info in proto.graph.output if info.type.HasField("tensor_type")]
    untold = [tensor for tensor in told if not tensor.HasField("shape")]
    outside = [(tensor, list(tensor.dims)) for tensor in _external_tensors(proto)]
    for tensor in untold:
        tensor.shape.SetInParent()
    for held, _ in outside:
        # Without values it needs no data.
        held.data_location = onnx.TensorProto.DEFAULT
        held.dims[:] = [0]
    try:
        onnx.checker.check_model(proto)
    finally:
        for tensor in untold:
            tensor.ClearField("shape")
        for held, dims in outside:
            held.data_location = onnx.TensorProto.EXTERNAL
            held.dims[:] = dims


def _require_valid(draft: Path) -> None:
    try:
        check_structure(onnx.load(draft, format="protobuf", load_external_data=False))
    except onnx.checker.ValidationError as error:
        raise InvariantError(f"the file to be written is not valid ONNX: {_first_line(error)}") from error


# -- external data --------------------------------------------------------------------------------------


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
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


def _require_data(path: Path, tensor: onnx.TensorProto) -> Path:
    """The file that holds a tensor; it must stand in the model's folder and be long enough."""
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise LoadError(
            f"the external data of {tensor.name} is described wrongly: {_first_line(error)}",
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


def _require_numbers(path: Path, tensor: Any) -> None:
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# -- a model and its data file, as one --------------------------------------------------------------------


def put_onnx(draft: Path, data: Path | None, path: Path, drafts: Drafts) -> None:
    """Have a model and its data, both written already, go to a claimed `path`."""
    drafts.put(draft, path)
    add_data(path, draft, data, drafts)


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
        locations = {ExternalDataInfo(tensor).location for tensor in _external_tensors(proto)}
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
    for tensor in _external_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    kept = [entry for entry in proto.metadata_props if entry.key != _OWN]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=_OWN, value=f"{name} {data.stat().st_size}")
    path.write_bytes(proto.SerializeToString())
