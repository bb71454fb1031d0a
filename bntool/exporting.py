"""Export a torch model to ONNX: capture, convert, clean, check, write. The model is left untouched."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntool.errors import ExportError, InvariantError
from bntool.inputs import Inputs, named_tensors
from bntool.onnx_cleaning import (
    census,
    clean,
    name_batch_axis,
    rename_initializers,
    rename_values,
)

# A protobuf message ends at 2 GiB; the graph itself and the names need room beside the weights.
SINGLE_FILE_LIMIT = int(1.8 * 2**30)

_BFLOAT16_OPSET = 22
_BATCH_NORM_OPS = (
    "aten.batch_norm.",
    "aten._native_batch_norm_legit",
    "aten.native_batch_norm.",
    "aten.cudnn_batch_norm.",
)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The file written: `nodes` counts its ops, `data_path` is the second file of a large model."""

    path: Path
    opset: int
    ir_version: int
    nodes: Mapping[str, int]
    data_path: Path | None
    notes: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "path": str(self.path), "data_path": str(self.data_path) if self.data_path else None}


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write `model`, in eval mode, as an ONNX file whose weights keep their state_dict names.

    The leading axis of the inputs becomes the dynamic axis `batch`, where torch can make it so; otherwise
    a note says that it is fixed. Every BatchNorm that the model calls stays a BatchNormalization node.
    Nothing is left behind when it fails. Raises `ExportError` for a model that torch or ONNX cannot take.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(
            f"there is no folder {target.parent}", next_step="make the folder, or choose another -o"
        )
    inputs = Inputs.of(example_inputs)
    notes = _mode_notes(model)
    subject = _eval_copy(model)
    with _silent():
        program, batch_symbol, capture_notes = _capture(subject, inputs, dynamic_batch)
        _refuse_batch_statistics(program)
        converted = _convert(program, opset or _least_opset(subject))
        onnx_model = converted.model
        _require_every_batch_norm(onnx_model, converted.exported_program)
        names = _tensor_names(subject)
        clean(onnx_model, names)
    notes += capture_notes
    rename_initializers(onnx_model, {n: first for n, first in names.items() if n != first})
    if batch_symbol:
        name_batch_axis(onnx_model, batch_symbol)
    input_names = _name_inputs(onnx_model, inputs, notes)
    output_names = _name_outputs(onnx_model, program, set(input_names))
    onnx_model.metadata_props.update(sorted((metadata or {}).items()))
    data_path = _write(onnx_model, target)
    return ExportResult(
        path=target,
        opset=int(onnx_model.opset_imports[""]),
        ir_version=int(onnx_model.ir_version),
        nodes=dict(sorted(census(onnx_model).items())),
        data_path=data_path,
        notes=tuple(notes),
        input_names=input_names,
        output_names=output_names,
    )


def _mode_notes(model: nn.Module) -> list[str]:
    training = sum(module.training for module in model.modules())
    return [f"{training} module(s) were in train mode; exported in eval mode"] if training else []


def _eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares every tensor: capture may leave marks on modules, never on weights."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        subject = copy.deepcopy(model, shared)
    except Exception as error:
        raise ExportError(
            f"the model cannot be copied: {_essence(error)}",
            where=type(model).__name__,
            next_step="remove what cannot be copied from the model (locks, open files, non-leaf tensors)",
        ) from error
    for module in subject.modules():
        module.training = False
    return subject


def _capture(
    model: nn.Module, inputs: Inputs, dynamic_batch: bool
) -> tuple[torch.export.ExportedProgram, str, list[str]]:
    """The exported program, the symbol of its batch axis (empty when fixed), and what to tell."""
    notes: list[str] = []
    if dynamic_batch:
        why = _no_batch_axis(inputs)
        if not why:
            try:
                return *_capture_dynamic(model, inputs), notes
            except Exception as error:  # noqa: BLE001 - the fixed capture below tells whether it matters
                why = _essence(error)
        notes.append(f"the batch axis is fixed, as in the example input ({inputs.shapes()}): {why}")
    try:
        program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture the model: {_essence(error)}",
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
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
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


def _least_opset(model: nn.Module) -> int | None:
    """The opset that the model's dtype needs; None leaves it to torch. Opset 22 brought bfloat16 to Conv."""
    return _BFLOAT16_OPSET if any(p.dtype == torch.bfloat16 for p in model.parameters()) else None


def _convert(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    try:
        converted = torch.onnx.export(
            program, f=None, dynamo=True, optimize=False, verbose=False, opset_version=opset
        )
    except Exception as error:
        raise ExportError(
            f"torch cannot convert the model to ONNX: {_essence(error)}",
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


def _refuse_batch_statistics(program: torch.export.ExportedProgram) -> None:
    for node in _batch_norm_nodes(program):
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


def _require_every_batch_norm(onnx_model: Any, program: torch.export.ExportedProgram) -> None:
    calls, written = len(_batch_norm_nodes(program)), census(onnx_model)["BatchNormalization"]
    if calls != written:
        raise ExportError(
            f"the model calls {calls} BatchNorm(s), but torch's exporter wrote {written}",
            next_step="pip install --upgrade onnxscript",
        )


def _argument_names(node: torch.fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def _batch_norm_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [
        node
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and str(node.target).startswith(_BATCH_NORM_OPS)
    ]


def _tensor_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in pairs}


def _name_inputs(onnx_model: Any, inputs: Inputs, notes: list[str]) -> tuple[str, ...]:
    values = list(onnx_model.graph.inputs)
    names = tuple(inputs.tensors())
    if len(values) != len(names):
        notes.append(f"the graph takes {len(values)} of the {len(names)} inputs given; names are torch's own")
        return tuple(str(value.name) for value in values)
    rename_values(values, names, onnx_model.graph)
    return names


def _name_outputs(onnx_model: Any, program: torch.export.ExportedProgram, taken: set[str]) -> tuple[str, ...]:
    """The names that running the torch model gives its outputs, so that the two compare by name."""
    values = list(onnx_model.graph.outputs)
    tensors = [
        torch.empty(0) if isinstance(spec.arg, torch.export.graph_signature.TensorArgument) else None
        for spec in program.graph_signature.output_specs
        if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT
    ]
    structure = torch.utils._pytree.tree_unflatten(tensors, program.call_spec.out_spec)
    names = tuple(name if name not in taken else f"{name}_output" for name, _ in named_tensors(structure))
    if len(names) != len(values) or len(set(names)) != len(names):
        names = tuple(f"output_{i}" for i in range(len(values)))
    rename_values(values, names, onnx_model.graph)
    return names


def _write(onnx_model: Any, target: Path) -> Path | None:
    """Write into a folder of our own beside the target, check there, then move: no half file is ever seen."""
    import onnx
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in onnx_model.graph.initializers.values() if v.const_value)
    data_name = f"{target.name}.data" if size > SINGLE_FILE_LIMIT else None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"cannot write beside {target}: {error.strerror}", next_step="choose another -o"
        ) from error
    try:
        written = folder / target.name
        ir.save(onnx_model, written, external_data=data_name)
        onnx.checker.check_model(str(written), full_check=True)
        if data_name:
            (folder / data_name).replace(target.with_name(data_name))
        written.replace(target)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the exported file is not valid ONNX: {_essence(error)}", next_step="try another --opset"
        ) from error
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"the shapes of the exported file contradict each other: {_essence(error)}",
            next_step="try another --opset",
        ) from error
    except OSError as error:
        raise ExportError(
            f"cannot write the file: {error.strerror or error}",
            where=str(target),
            next_step="free some space, or choose another -o",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target.with_name(data_name) if data_name else None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
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


def _essence(error: BaseException) -> str:
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
