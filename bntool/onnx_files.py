"""Open and save ONNX files: names, metadata and order are kept, and external data stays external."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo

from bntool.errors import InvariantError, LoadError, UsageError
from bntool.files.atomic import require_writable
from bntool.files.detect import Kind, detect
from bntool.files.drafts import alone_in, draft_folder, place

SINGLE_FILE_LIMIT = int(1.8 * 2**30)
"""A protobuf message ends at 2 GiB; the graph itself and the names need room beside the weights."""
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
    """Write the model; what was external goes to one file beside the output (`data_place`).

    A model too large for a single file is split alike. Returns the paths of both files.

    Raises:
        UsageError: the output exists without `force`, is an input, or cannot be written.
    """
    forbid = (file.path, *file.data_files)
    target = require_writable(output, force=force, forbid=forbid)
    moving = _to_move(file)
    if moving:
        require_data_writable(target, force=force, forbid=forbid)
    try:
        with draft_folder(target) as folder:
            draft = folder / target.name
            _write(file.model, draft, moving)
            _require_valid(draft)
            # One of them may have appeared meanwhile.
            require_writable(output, force=force, forbid=forbid)
            data = draft.with_name(f"{draft.name}.data") if moving else None
            return target, move_onnx(draft, data, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {output}: {error.strerror or error}",
            next_step="check the folder's permissions and the space on the disk, or name another -o OUTPUT",
        ) from error


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


def data_place(target: str | Path) -> Path:
    """Where the data of a model to be written as `target` goes: `NAME.onnx.data`.

    `NAME.onnx.data.1` while the model that stands there reads the first: it stays whole until the new one,
    which names the other file, takes its place in one step.
    """
    target = Path(os.path.realpath(target))
    first, second = _data_names(target)
    return second if first.exists() and first.name in _locations(target) else first


def require_data_writable(target: Path, *, force: bool, forbid: Iterable[Path] = ()) -> None:
    """Raise `UsageError` where the data of a model to be written as `target` may not be written."""
    there = data_place(target)
    # The other of the two names goes once it is no longer read.
    for path in _data_names(Path(os.path.realpath(target))):
        if path == there or path.exists():
            require_writable(path, force=force or path != there, forbid=forbid)


def move_onnx(path: Path, data: Path | None, target: Path) -> Path | None:
    """Move a written model, and its data file, into place in the same file system; the data file's place.

    At every moment `target` is the old model with its data, or the new one. Raises `UsageError` where it
    cannot be moved.
    """
    target = Path(os.path.realpath(target))
    try:
        with alone_in(target.parent):
            return _moved(path, data, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}", next_step="name another -o OUTPUT"
        ) from error


def _moved(path: Path, data: Path | None, target: Path) -> Path | None:
    if data is None:
        place(path, target)
        return None
    there = data_place(target)
    if there.name != data.name:
        _rename_data(path, there.name)
    place(data, there)
    # The model comes last: it is the file that names the other.
    place(path, target)
    for old in set(_data_names(target)) - {there}:
        old.unlink(missing_ok=True)
    return there


def _data_names(target: Path) -> tuple[Path, Path]:
    return target.with_name(f"{target.name}.data"), target.with_name(f"{target.name}.data.1")


def _locations(path: Path) -> set[str]:
    """The data files that the model at `path` names; none where there is no model."""
    if not path.is_file():
        return set()
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        return {ExternalDataInfo(tensor).location for tensor in _external_tensors(proto)}
    except (DecodeError, OSError, ValueError, TypeError):
        return set()


def _rename_data(path: Path, name: str) -> None:
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    for tensor in _external_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(proto.SerializeToString())
