"""Export a torch model to ONNX: capture, convert, clean, check, write. The model is left untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntool.core.errors import ExportError
from bntool.core.options import ExportOptions
from bntool.core.sites import Unshared
from bntool.export.capturing import (
    batch_norm_nodes,
    capture,
    convert,
    fixed_batch,
    mode_notes,
    refuse_batch_statistics,
    running_instance_norms,
    silent,
)
from bntool.export.dynamic_axes import DynamicAxes
from bntool.export.onnx_cleaning import census, clean, name_axes, rename_initializers, rename_values
from bntool.export.onnx_versions import chosen_ir_version, loads_in
from bntool.export.onnx_writing import keep_float32_io, narrow_type, write_checked
from bntool.files.targets import Target
from bntool.graph.inputs import Inputs, named_tensors
from bntool.observe.isolation import Isolation
from bntool.observe.wrappers import model_inside
from bntool.precision.casting import DTYPES, cast_copy


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The file written: `nodes` counts its ops, `data_path` is the second file of a large model.

    `folded` maps BatchNormalization nodes that were folded in the graph itself to the layers they went into,
    `merged` convolutions to the parallel ones that they now are; `unshared` says what the clones made for
    that add.
    `dtype` is `fp16` or `bf16` where the weights were cast, else empty; `loads_in` the first ONNX Runtime
    release that takes the file, empty where that is not known.
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
    dtype: str = ""
    loads_in: str = ""

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "path": str(self.path), "data_path": str(self.data_path) if self.data_path else None}


@dataclasses.dataclass(frozen=True)
class Form:
    """What the file is to be, whatever it is made from.

    `names` maps every name of every stored tensor to the first name of the same tensor.
    """

    path: Path
    how: ExportOptions
    metadata: Mapping[str, str]
    force: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    how: ExportOptions,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> ExportResult:
    """Write `model`, in eval mode, as an ONNX file whose weights keep their state_dict names.

    The leading axis of the inputs becomes the dynamic axis `batch`, where torch can make it so; otherwise
    a note says that it is fixed. Axes that the options name must become dynamic. Every BatchNorm that the
    model calls stays a BatchNormalization node. Of a model in a wrapper (`DistributedDataParallel`,
    `torch.compile`, …) the one inside is written, under its own names.

    Nothing is left behind when it fails. Raises `ExportError` for a model that torch or ONNX cannot take,
    or whose numbers do not fit `dtype`; `UsageError` for an axis or an IR version that there is not, and
    where `path` exists and not `force`.
    """
    model, _ = model_inside(model)
    target = _target(path, force)
    inputs = Inputs.of(example_inputs)
    axes = DynamicAxes(not how.static_batch, how.axes())
    axes.named_for(inputs)
    notes = mode_notes(model)
    isolation = Isolation(model)
    with isolation.run(watched=False) as subject:
        if how.narrow:
            dtype = DTYPES[how.narrow]
            subject, inputs = cast_copy(subject, dtype), inputs.to(dtype=dtype)
            torch.set_default_dtype(dtype)  # a tensor that forward makes without a dtype follows
        names = _tensor_names(subject)
        form = Form(target, how, metadata or {}, force, names)
        by = _traced if how.exporter == "legacy" else _captured
        return by(subject, inputs, axes, form, notes + isolation.notes)


def export_program(
    program: torch.export.ExportedProgram,
    example_inputs: Any,
    path: str | Path,
    how: ExportOptions,
    *,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write an exported program as an ONNX file, its axes dynamic where the program's are.

    Otherwise as `export_onnx`, over a draft that a first try may have left.
    """
    names = {name: name for name in (*program.state_dict, *program.constants)}
    form = Form(_target(path, True), how, metadata or {}, True, names)
    return _cleaned(_converted(program, how.opset), Inputs.of(example_inputs), {}, form, [])


def _target(path: str | Path, force: bool) -> Path:
    """Before any work: the file can be written."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(
            f"there is no folder {target.parent}", next_step="make the folder, or choose another -o"
        )
    Target(force=force).claim(target)
    return target


def _captured(
    model: nn.Module, inputs: Inputs, axes: DynamicAxes, form: Form, notes: list[str]
) -> ExportResult:
    """By torch.export; with the batch axis fixed where torch can capture an open one but not convert it."""
    with silent():
        program, symbols, told = capture(model, inputs, axes)
    try:
        converted = _converted(program, form.how.opset)
    except ExportError as error:
        if told or not axes.batch:
            raise
        try:
            with silent():
                program, symbols, _ = capture(model, inputs, dataclasses.replace(axes, batch=False))
            converted = _converted(program, form.how.opset)
        except ExportError:
            raise error from None
        told = [fixed_batch(inputs, error.what)]
    return _cleaned(converted, inputs, symbols, form, notes + told)


def _converted(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    with silent():
        refuse_batch_statistics(program)
        return convert(program, opset)


def _cleaned(
    converted: Any, inputs: Inputs, symbols: Mapping[str, str], form: Form, notes: list[str]
) -> ExportResult:
    """What torch's exporter made, with the names of the user's model."""
    onnx_model, program = converted.model, converted.exported_program
    calls = len(batch_norm_nodes(program))
    _require_every_batch_norm(onnx_model, range(calls, calls + 1), running_instance_norms(program))
    notes = notes + _clean(onnx_model, form.names)
    name_axes(onnx_model, symbols)
    input_names = _name_inputs(onnx_model, inputs, notes)
    _name_outputs(onnx_model, _output_names(program), set(input_names))
    return written(onnx_model, form, notes)


def _traced(
    model: nn.Module, inputs: Inputs, axes: DynamicAxes, form: Form, notes: list[str]
) -> ExportResult:
    from bntool.export.legacy_exporting import trace

    onnx_model, output_names, calls, told = trace(model, inputs, axes, form.how.opset)
    _require_every_batch_norm(onnx_model, calls)
    notes = notes + told + _clean(onnx_model, form.names)
    taken = {str(value.name) for value in onnx_model.graph.inputs}
    _name_outputs(onnx_model, output_names, taken)
    return written(onnx_model, form, notes)


def _clean(onnx_model: Any, names: Mapping[str, str]) -> list[str]:
    """Clean a graph in place, its stored tensors under their first names; what to tell."""
    with silent():
        computed = clean(onnx_model, names)
    rename_initializers(onnx_model, {n: first for n, first in names.items() if n != first})
    if not computed:
        return []
    return [f"{computed} weights that BatchNorm standardises are stored as what they come to"]


def written(onnx_model: Any, form: Form, notes: Sequence[str] = ()) -> ExportResult:
    """An ONNX model in memory as a file in that form; checked before it takes its place."""
    opset = int(onnx_model.opset_imports[""])
    onnx_model.ir_version = chosen_ir_version(opset, form.how.ir_version)
    if form.how.keep_io:
        keep_float32_io(onnx_model, narrow_type(form.how.narrow))
    onnx_model.metadata_props.update(sorted(form.metadata.items()))
    data_path = write_checked(onnx_model, form.path, form.how.external_data, force=form.force)
    return ExportResult(
        path=form.path,
        opset=opset,
        ir_version=int(onnx_model.ir_version),
        nodes=dict(sorted(census(onnx_model).items())),
        data_path=data_path,
        notes=tuple(notes),
        input_names=tuple(str(value.name) for value in onnx_model.graph.inputs),
        output_names=tuple(str(value.name) for value in onnx_model.graph.outputs),
        dtype=form.how.narrow,
        loads_in=loads_in(opset, int(onnx_model.ir_version)),
    )


def _require_every_batch_norm(onnx_model: Any, expected: range, instance_norms: int = 0) -> None:
    """An InstanceNorm with running statistics is written as a BatchNormalization too: it is one."""
    written = census(onnx_model)["BatchNormalization"] - instance_norms
    if written not in expected:
        raise ExportError(
            f"the model calls {expected[-1]} BatchNorm(s), but torch's exporter wrote {written}",
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


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """The names that running the torch model gives its outputs, so that the two compare by name."""
    tensors = [
        torch.empty(0) if isinstance(spec.arg, torch.export.graph_signature.TensorArgument) else None
        for spec in program.graph_signature.output_specs
        if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT
    ]
    structure = torch.utils._pytree.tree_unflatten(tensors, program.call_spec.out_spec)
    return [name for name, _ in named_tensors(structure)]


def _name_outputs(onnx_model: Any, wanted: Sequence[str], taken: set[str]) -> None:
    values = list(onnx_model.graph.outputs)
    names = tuple(name if name not in taken else f"{name}_output" for name in wanted)
    if len(names) != len(values) or len(set(names)) != len(names):
        names = tuple(f"output_{i}" for i in range(len(values)))
    rename_values(values, names, onnx_model.graph)
