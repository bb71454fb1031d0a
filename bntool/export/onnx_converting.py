"""An ONNX file in another opset, by ONNX's own converter."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir

from bntool.core.errors import ExportError, UsageError
from bntool.export.onnx_versions import chosen_ir_version
from bntool.files.onnx_data import first_line, whole_proto
from bntool.files.onnx_forms import take_off_inputs, to_one_form

_LISTED_UNTIL = 4
"""Before this IR version every weight is listed as an input, and none is meant to be replaced."""


def converted(path: Path, opset: int, ir_version: int | None = None) -> ir.Model:
    """The model of a file in another opset, all numbers in memory.

    Raises:
        UsageError: there is no such opset, or the IR version does not go with it.
        ExportError: the converter cannot: an op has no counterpart, or the model is too large for it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise UsageError(f"there is no opset {opset}", next_step=f"use --opset 7 to {newest}")
    chosen = chosen_ir_version(opset, ir_version)
    try:
        proto = whole_proto(path)
        to_one_form(proto)
        if proto.functions:  # the converter forgets their bodies
            proto = onnx.inliner.inline_local_functions(proto)
        done = onnx.version_converter.convert_version(proto, opset)
        onnx.checker.check_model(done)
    except Exception as error:  # whatever a converter of an op raises
        raise ExportError(
            f"ONNX's converter cannot bring it to opset {opset}: {first_line(error)}",
            where=str(path),
            next_step="try another --opset, or export the PyTorch model with that opset",
        ) from error
    model = ir.from_proto(done)
    if proto.ir_version < _LISTED_UNTIL:
        take_off_inputs(model)
    model.ir_version = chosen
    return model
