"""Write an exported graph as a file that is checked before it stands in its place."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from bntool.core.errors import ExportError, UsageError
from bntool.export.capturing import essence
from bntool.files.onnx_data import add_data
from bntool.files.onnx_files import SINGLE_FILE_LIMIT, check_structure
from bntool.files.targets import Target

ExternalData = Literal["auto", "always", "never"]


def keep_float32_io(model: ir.Model, dtype: ir.DataType) -> None:
    """Have the graph take and return float32 where it takes and returns `dtype`: a Cast at each end."""
    graph = model.graph
    wide = ir.DataType.FLOAT
    for at, inner in enumerate(list(graph.inputs)):
        if inner.dtype != dtype:
            continue
        outer = ir.Value(name=inner.name, type=ir.TensorType(wide), shape=inner.shape)
        inner_name = f"{inner.name}_narrow"
        cast = ir.node("Cast", [outer], {"to": int(dtype)}, name=f"{inner.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].shape = inner_name, inner.shape
        cast.outputs[0].type = ir.TensorType(dtype)
        inner.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        graph.inputs[at] = outer
        graph.insert_before(graph[0], cast) if len(graph) else graph.append(cast)
    for at, inner in enumerate(list(graph.outputs)):
        if inner.dtype != dtype:
            continue
        cast = ir.node("Cast", [inner], {"to": int(wide)}, name=f"{inner.name}/Cast")
        cast.outputs[0].name, cast.outputs[0].shape = inner.name, inner.shape
        cast.outputs[0].type = ir.TensorType(wide)
        inner.name = f"{inner.name}_narrow"
        graph.outputs[at] = cast.outputs[0]
        graph.append(cast)


def write_checked(
    model: ir.Model, path: Path, external_data: ExternalData = "auto", *, force: bool = False
) -> Path | None:
    """Write a draft, check it, and only then put it into place: no half file is ever seen.

    Returns the data file of a model that has one (`onnx_files.add_data`). Raises `ExportError`, and
    `UsageError` where `path` exists and not `force`.
    """
    import onnx

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if external_data == "never" and size > SINGLE_FILE_LIMIT:
        raise ExportError(
            f"{size:,} bytes of weights do not fit a single ONNX file, which ends at 2 GiB",
            next_step="leave --external-data never out: the weights then go to one file beside it",
        )
    split = external_data == "always" or size > SINGLE_FILE_LIMIT
    target = Target(force=force)
    claimed = target.claim(path)
    try:
        with target.drafts() as drafts:
            draft = drafts.of(claimed)
            data = draft.with_name(f"{draft.name}.data")
            ir.save(model, draft, external_data=data.name if split else None)
            _require_valid(draft)
            # No weight may have been large enough to leave the file.
            add_data(claimed, draft, data if data.exists() else None, drafts)
        return drafts.part_of(claimed)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the exported file is not valid ONNX: {essence(error)}", next_step="try another --opset"
        ) from error
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"the shapes of the exported file contradict each other: {essence(error)}",
            next_step="try another --opset",
        ) from error
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            raise cannot_write(path, error.__cause__) from error
        raise


def _require_valid(written: Path) -> None:
    """ONNX's own check, with that of all shapes where its library can be told the file's name in UTF-8."""
    import onnx

    try:
        str(written).encode()
    except UnicodeEncodeError:
        check_structure(onnx.load(written, load_external_data=False))
    else:
        onnx.checker.check_model(str(written), full_check=True)


def append_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add metadata to a finished file. Raises `ExportError`.

    A protobuf message followed by another of its type is the two merged, lists one after the other: so
    neither the graph nor the weights are read or written again.
    """
    import onnx

    added = onnx.ModelProto()
    onnx.helper.set_model_props(added, dict(sorted(entries.items())))
    try:
        with path.open("ab") as file:
            file.write(added.SerializeToString())
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(target: Path, error: OSError) -> ExportError:
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return ExportError(
        f"cannot write the file: {error.strerror or error}",
        where=str(target),
        next_step="free some space, or choose another -o" if full else "choose another -o",
    )


def narrow_type(name: str) -> Any:
    """The ONNX type of `fp16` or `bf16`."""
    return {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[name]
