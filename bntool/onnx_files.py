"""Open and save ONNX files: names, metadata and order are kept, and external data stays external."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo

from bntool.errors import InvariantError, LoadError, UsageError
from bntool.files.atomic import require_writable, write_atomically
from bntool.files.detect import Kind, detect

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
    data_files = dict.fromkeys(_require_data(path, tensor) for tensor in _external_tensors(proto))
    try:
        _check(path, proto, bool(data_files))
        model = ir.from_proto(proto)
    except (onnx.checker.ValidationError, ValueError, KeyError, TypeError) as error:
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
    """Write the model; what was external goes to one file beside the output, `NAME.onnx.data`.

    A model too large for a single file is split alike. Returns the paths of both files.

    Raises:
        UsageError: the output exists without `force`, is an input, or cannot be written.
    """
    forbid = (file.path, *file.data_files)
    target = require_writable(output, force=force, forbid=forbid)
    moving = _to_move(file)
    data = target.with_name(f"{target.name}.data") if moving else None
    if data is not None:
        require_writable(data, force=force, forbid=forbid)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(
            f"cannot write beside {target}: {error.strerror}", next_step="name another -o OUTPUT"
        ) from error
    try:
        draft = folder / target.name
        try:
            _write(file.model, draft, moving)
        except OSError as error:
            raise UsageError(
                f"cannot write {output}: {error.strerror or error}",
                next_step="check the space on the disk, or name another -o OUTPUT",
            ) from error
        _require_valid(draft, bool(data))

        def place(temporary: Path) -> None:
            # The model comes last: it is the file that names the other.
            if data is not None:
                (folder / data.name).replace(data)
            draft.replace(temporary)

        write_atomically(output, place, force=force, forbid=forbid)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target, data


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


def _check(path: Path, proto: onnx.ModelProto, has_data: bool) -> None:
    """ONNX's own check, but that an output needs no shape: runtimes take it without one."""
    told = [info.type.tensor_type for info in proto.graph.output if info.type.HasField("tensor_type")]
    untold = [tensor for tensor in told if not tensor.HasField("shape")]
    if not untold:
        onnx.checker.check_model(str(path))
    elif not has_data:
        # External data is looked for beside a path only, so such a file goes without.
        for tensor in untold:
            tensor.shape.SetInParent()
        try:
            onnx.checker.check_model(proto)
        finally:
            for tensor in untold:
                tensor.ClearField("shape")


def _require_valid(draft: Path, has_data: bool) -> None:
    try:
        _check(draft, onnx.load(draft, format="protobuf", load_external_data=False), has_data)
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
    inside = info.location and all(
        not pure.is_absolute() and not pure.drive and ".." not in pure.parts
        for pure in (PurePosixPath(info.location), PureWindowsPath(info.location))
    )
    if not inside:
        raise LoadError(
            f"the weight {tensor.name} is said to be in {info.location!r}, outside the model's folder",
            where=str(path),
            next_step="move the data beside the model and export it again",
        )
    data = path.parent / info.location
    if not data.is_file():
        raise LoadError(
            f"the weight {tensor.name} is in {info.location}, which is not there",
            where=str(path),
            next_step=f"put {info.location} beside the model",
        )
    end = (info.offset or 0) + (info.length or 0)
    if data.stat().st_size < end:
        raise LoadError(
            f"{info.location} has {data.stat().st_size:,} bytes; the weight {tensor.name} ends at {end:,}",
            where=str(path),
            next_step="download or copy it again",
        )
    return data


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def move_onnx(path: Path, data: Path | None, target: Path) -> None:
    """Move a written model, and its data file, into place in the same folder's file system.

    The model comes last: it is the file that names the other. Raises `UsageError` where that fails.
    """
    try:
        if data is not None:
            data.replace(target.with_name(data.name))
        path.replace(target)
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}", next_step="name another -o OUTPUT"
        ) from error
