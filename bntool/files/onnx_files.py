"""Open and save ONNX files: names, metadata and order are kept, and external data stays external."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from bntool.core.errors import InvariantError, LoadError
from bntool.files.detect import Kind, detect
from bntool.files.drafting import Drafts
from bntool.files.onnx_data import add_data, external_tensors, first_line, require_data, require_numbers
from bntool.files.onnx_forms import inline_functions, name_apart, to_one_form
from bntool.files.onnx_unfusing import unfuse
from bntool.files.targets import Target

LEAST_OPSET = 7
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

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is in."""
        return (self.path, *self.data_files)


def require_opset(model: ir.Model, name: str) -> None:
    """Raise `LoadError` for ops that broadcast, and normalise, by rules of their own."""
    opset = model.opset_imports.get("", LEAST_OPSET)
    if opset < LEAST_OPSET:
        raise LoadError(
            f"it is written in opset {opset}, and bntool changes files of opset {LEAST_OPSET} or later",
            where=name,
            next_step=f"bntool export {shlex.quote(name)} --opset 17 converts it",
        )


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
            f"the file is damaged: {first_line(error)}",
            where=str(path),
            next_step="download or export it again",
        ) from error
    try:
        to_one_form(proto)
        data_files = dict.fromkeys(require_data(path, tensor) for tensor in external_tensors(proto))
        check_structure(proto)
        model = ir.from_proto(proto)
        for _, tensor, _ in _slots(model):
            require_numbers(path, tensor)
    except LoadError:
        raise
    except Exception as error:  # any type can come out of a damaged file
        raise LoadError(
            f"the file is not valid ONNX: {first_line(error)}", where=str(path), next_step="export it again"
        ) from error
    for _, tensor, put in _slots(model):
        if isinstance(tensor, ir.ExternalTensor):
            put(_where_it_is(tensor, path.parent))
    inline_functions(model)
    unfuse(model)
    name_apart(model)
    external = [
        name for name, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    return OnnxFile(path, model, frozenset(external), tuple(data_files))


def _where_it_is(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    """The same tensor in the file that its own is a link to: onnx_ir follows no link out of a folder."""
    real = Path(os.path.realpath(folder / tensor.location))
    return ir.ExternalTensor(
        real.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        doc_string=tensor.doc_string,
        base_dir=real.parent,
    )


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

    An input or output needs no shape: runtimes take it without one. The proto is afterwards what it was.
    Raises `ValidationError`.
    """
    ends = (*proto.graph.input, *proto.graph.output)
    told = [info.type.tensor_type for info in ends if info.type.HasField("tensor_type")]
    untold = [tensor for tensor in told if not tensor.HasField("shape")]
    outside = [(tensor, list(tensor.dims)) for tensor in external_tensors(proto)]
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
        raise InvariantError(f"the file to be written is not valid ONNX: {first_line(error)}") from error


def put_onnx(draft: Path, data: Path | None, path: Path, drafts: Drafts) -> None:
    """Have a model and its data, both written already, go to a claimed `path`."""
    drafts.put(draft, path)
    add_data(path, draft, data, drafts)
