"""Capture a torch model with torch.export and convert it to ONNX, without a word on stdout or stderr."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bntool.errors import ExportError, InvariantError
from bntool.inputs import Inputs

_BFLOAT16_OPSET = 22
_BATCH_NORM_OPS = (
    "aten.batch_norm.",
    "aten._native_batch_norm_legit",
    "aten.native_batch_norm.",
    "aten.cudnn_batch_norm.",
)


def capture(
    model: nn.Module, inputs: Inputs, dynamic_batch: bool
) -> tuple[torch.export.ExportedProgram, str, list[str]]:
    """The exported program, the symbol of its batch axis (empty when fixed), and what to tell.

    Raises `ExportError` when torch.export cannot capture the model in eval mode on these inputs.
    """
    notes: list[str] = []
    if dynamic_batch:
        why = _no_batch_axis(inputs)
        if not why:
            try:
                return *_capture_dynamic(model, inputs), notes
            except Exception as error:  # noqa: BLE001 - the fixed capture below tells whether it matters
                why = essence(error)
        notes.append(f"the batch axis is fixed, as in the example input ({inputs.shapes()}): {why}")
    try:
        program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture the model: {essence(error)}",
            where=_user_line(error),
            next_step="make forward free of decisions on tensor values, or keep the model in torch",
        ) from error
    return program, "", notes


def _no_batch_axis(inputs: Inputs) -> str:
    if any(isinstance(value, list | tuple | dict) for value in (*inputs.args, *inputs.kwargs.values())):
        return "the inputs are nested, so no axis is surely the batch"
    sizes = {t.shape[0] for t in inputs.tensors().values() if t.dim()}
    if len(sizes) != 1:
        return "the inputs have no common leading axis"
    return ""


def _capture_dynamic(model: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, str]:
    # A sample of 1 would be taken for a constant: torch specialises axes of length 0 and 1.
    sample = (
        inputs if next(t for t in inputs.tensors().values() if t.dim()).shape[0] > 1 else inputs.rebatched(2)
    )
    axis = torch.export.Dim("batch")
    shapes = torch.export.ShapesCollection()
    for tensor in sample.tensors().values():
        if tensor.dim():
            shapes[tensor] = {0: axis}
    program = torch.export.export(
        model, sample.args, dict(sample.kwargs), dynamic_shapes=shapes, strict=False
    )
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in program.graph_signature.user_inputs and isinstance(value, Tensor) and value.dim():
            return program, str(value.shape[0])
    return program, ""


def least_opset(model: nn.Module) -> int | None:
    """The opset that the model's dtype needs; None leaves it to torch. Opset 22 brought bfloat16 to Conv."""
    return _BFLOAT16_OPSET if any(p.dtype == torch.bfloat16 for p in model.parameters()) else None


def convert(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    """The program as torch's `ONNXProgram`, nothing optimised.

    Raises `ExportError` when an op has no ONNX form or the opset asked for cannot be written.
    """
    try:
        converted = torch.onnx.export(
            program, f=None, dynamo=True, optimize=False, verbose=False, opset_version=opset
        )
    except Exception as error:
        raise ExportError(
            f"torch cannot convert the model to ONNX: {essence(error)}",
            where=_user_line(error),
            next_step="try another --opset, or pip install --upgrade onnxscript",
        ) from error
    if converted is None:
        raise InvariantError("torch.onnx.export returned nothing")
    written = int(converted.model.opset_imports[""])
    if opset is not None and written != opset:
        raise ExportError(
            f"opset {opset} was asked for, torch's exporter could only write {written}",
            next_step=f"use --opset {written}",
        )
    return converted


def refuse_batch_statistics(program: torch.export.ExportedProgram) -> None:
    """Raise `ExportError`, naming the layer, when a BatchNorm normalises with the batch even in eval mode."""
    for node in batch_norm_nodes(program):
        schema = _argument_names(node)
        flag = next((schema.index(name) for name in ("training", "train") if name in schema), len(node.args))
        if flag < len(node.args) and node.args[flag]:
            stack = node.meta.get("nn_module_stack") or {}
            layer = [name for name, _ in stack.values()][-1:]
            raise ExportError(
                "a BatchNorm normalises with the statistics of the batch, also in eval mode",
                where=(layer[0] if layer else "") or str(node.name),
                next_step="give it running statistics first: `bntool calibrate --data ...`",
            )


def _argument_names(node: torch.fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def batch_norm_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Every call of a batch normalisation, subgraphs included."""
    return [
        node
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and str(node.target).startswith(_BATCH_NORM_OPS)
    ]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the exporter's prints, logs and own warnings away; what matters is raised or noted."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            for module in ("torch", "onnxscript", "onnx_ir", "onnx", "copyreg"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def essence(error: BaseException) -> str:
    """The line that says what went wrong: the first of the deepest cause, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    broken = [line for line in lines if line.startswith("- ")]  # torch lists violated constraints so
    line = (
        broken[0].removeprefix("- ") if broken and "onstraints violated" in lines[0] else (lines or [""])[0]
    )
    # What follows is advice on torch's own flags, which the user of this export does not set.
    return (
        re.split(r"\s*For more information, run with |\. If you're using ", line)[0] or type(error).__name__
    )


def _user_line(error: BaseException) -> str:
    """The last line of the model's own code that the error names."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    own = [entry for entry in found if "site-packages" not in entry[0]]
    return "{}, line {}, in {}".format(*own[-1]) if own else ""
