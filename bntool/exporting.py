"""Export a torch model to ONNX: capture, convert, clean, check, write. The model is left untouched."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.capturing import (
    batch_norm_nodes,
    capture,
    convert,
    essence,
    least_opset,
    refuse_batch_statistics,
    silent,
)
from bntool.errors import ExportError
from bntool.inputs import Inputs, named_tensors
from bntool.onnx_cleaning import (
    census,
    clean,
    name_batch_axis,
    rename_initializers,
    rename_values,
)
from bntool.plan import Unshared

# A protobuf message ends at 2 GiB; the graph itself and the names need room beside the weights.
SINGLE_FILE_LIMIT = int(1.8 * 2**30)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The file written: `nodes` counts its ops, `data_path` is the second file of a large model.

    `folded` maps BatchNormalization nodes that were folded in the graph itself to the layers they went into,
    `merged` convolutions to the parallel ones that they now are; `unshared` says what the clones made for
    that add.
    """

    path: Path
    opset: int
    ir_version: int
    nodes: Mapping[str, int]
    data_path: Path | None
    notes: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    folded: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    merged: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unshared: Unshared = dataclasses.field(default_factory=Unshared)

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
    with silent():
        program, batch_symbol, capture_notes = capture(subject, inputs, dynamic_batch)
    names = _tensor_names(subject)
    return _exported(
        program,
        inputs,
        target,
        opset=opset or least_opset(subject),
        names=names,
        batch_symbol=batch_symbol,
        notes=notes + capture_notes,
        metadata=metadata,
    )


def export_program(
    program: torch.export.ExportedProgram,
    example_inputs: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write an exported program as an ONNX file, its axes dynamic where the program's are.

    Otherwise as `export_onnx`.
    """
    return _exported(
        program,
        Inputs.of(example_inputs),
        Path(path),
        opset=opset,
        names={name: name for name in (*program.state_dict, *program.constants)},
        batch_symbol="",
        notes=[],
        metadata=metadata,
    )


def _exported(
    program: torch.export.ExportedProgram,
    inputs: Inputs,
    target: Path,
    *,
    opset: int | None,
    names: Mapping[str, str],
    batch_symbol: str,
    notes: list[str],
    metadata: Mapping[str, str] | None,
) -> ExportResult:
    with silent():
        refuse_batch_statistics(program)
        converted = convert(program, opset)
        onnx_model = converted.model
        _require_every_batch_norm(onnx_model, converted.exported_program)
        clean(onnx_model, names)
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
            f"the model cannot be copied: {essence(error)}",
            where=type(model).__name__,
            next_step="remove what cannot be copied from the model (locks, open files, non-leaf tensors)",
        ) from error
    for module in subject.modules():
        module.training = False
    return subject


def _require_every_batch_norm(onnx_model: Any, program: torch.export.ExportedProgram) -> None:
    calls, written = len(batch_norm_nodes(program)), census(onnx_model)["BatchNormalization"]
    if calls != written:
        raise ExportError(
            f"the model calls {calls} BatchNorm(s), but torch's exporter wrote {written}",
            next_step="pip install --upgrade onnxscript",
        )


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
            f"the exported file is not valid ONNX: {essence(error)}", next_step="try another --opset"
        ) from error
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"the shapes of the exported file contradict each other: {essence(error)}",
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
