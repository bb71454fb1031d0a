"""From a model to a file that is served, and models compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bntool.api.asked import Model
from bntool.core.collecting import paused
from bntool.core.errors import UsageError
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions
from bntool.export.exporting import ExportResult
from bntool.export.exporting import export_onnx as _export_onnx
from bntool.files.targets import Target
from bntool.graph.inputs import Inputs
from bntool.pipeline import surgeries
from bntool.pipeline.serving import Serving, Silent, served
from bntool.report.checks import Comparison
from bntool.report.results import SurgeryResult
from bntool.subjects import subject_of
from bntool.subjects.base import Checking, Narrow


@torch.inference_mode(False)
@paused()
def fold_to_onnx(
    model: Model,
    path: str | Path,
    example_inputs: Any = None,
    *,
    fold: FoldOptions | None = None,
    export: ExportOptions | None = None,
    check: CheckOptions | None = None,
    dtype: Narrow = "",
    force: bool = False,
) -> SurgeryResult:
    """The whole way of `bntool fold --export onnx`: fold, prove, export, verify.

    Args:
        model: an `nn.Module` or an `ExportedProgram`, or a path or reference of one.
        path: where the ONNX file goes; nothing is written unless every stage passes.
        example_inputs: as for `fold`.
        fold: which BatchNorms may go; by default all.
        export: what the file is to be like.
        check: how much is verified, and by what limit; by default on batches of 1, 2 and 3.
        dtype: `fp16` or `bf16` casts the file's numbers.
        force: whether `path` may be replaced.

    Returns:
        The result of the fold, with the checks of all stages and what was exported in `export`. Where nothing
        folds, the model is exported as it is.

    Raises:
        CheckFailed: a stage does not compute the same.
        ExportError: the model cannot be exported, or the file does not run.
        UsageError: an option that this kind of model does not know, or a `path` that may not be written.
    """
    from bntool.files.onnx_files import put_onnx
    from bntool.subjects.base import Exportable

    options, how, asked = fold or FoldOptions(), export or ExportOptions(), check or CheckOptions()
    subject: Any = subject_of(model, example_inputs, options, how, asked)
    if subject.kind not in ("module", "program"):
        raise UsageError(
            f"{subject.name} cannot be exported from here", next_step="bntool.export_onnx takes a module"
        )
    target = Target(force=force, reads=subject.files)
    claimed = target.claim(path)
    checking = Checking.of(asked, axes=how.axes())
    proof: Any = None if checking is None else subject.proof(checking)
    result, after = surgeries.fold(subject, options, proof)
    exportable: Exportable = after
    with target.drafts() as drafts:
        draft = drafts.folder_for(claimed) / claimed.name
        pair = None if checking is None else (proof.reference, checking)
        result = served(exportable, result, draft, Serving(how, dtype, options), pair, Silent())
        assert result.export is not None
        put_onnx(result.export.path, result.export.data_path, claimed, drafts)
    export_result = dataclasses.replace(result.export, path=claimed, data_path=drafts.part_of(claimed))
    return dataclasses.replace(result, export=export_result)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    ir_version: int | None = None,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    external_data: Literal["auto", "always", "never"] = "auto",
    dtype: Literal["", "fp16", "bf16"] = "",
    keep_io: bool = False,
    exporter: Literal["dynamo", "legacy"] = "dynamo",
    force: bool = False,
) -> Path:
    """Write the model in eval mode as ONNX, weights named by qualified name; no BatchNorm is folded here.

    `opset` and `ir_version` are the lowest that work unless given. `dynamic` names axes to leave open
    besides the batch, by input: `{"input": (2, 3)}`. `dtype` casts weights, inputs and outputs; with
    `keep_io` inputs and outputs stay float32. `exporter="legacy"` traces. `force` replaces a file.

    Raises:
        ExportError: the model cannot be exported, or its numbers do not fit `dtype`.
        UsageError: an axis or an IR version that there is not; a `path` that exists without `force`.
    """
    return exported(
        model,
        example_inputs,
        path,
        opset=opset,
        ir_version=ir_version,
        dynamic_batch=dynamic_batch,
        dynamic=dynamic,
        external_data=external_data,
        dtype=dtype,
        keep_io=keep_io,
        exporter=exporter,
        force=force,
    ).path


def exported(model: nn.Module, example_inputs: Any, path: str | Path, **options: Any) -> ExportResult:
    """`export_onnx`, with everything it found out."""
    return _export_onnx(model, Inputs.of(example_inputs), path, **options)


def verify(
    reference: Model,
    candidate: Model,
    inputs: Any = None,
    *,
    device: str = "auto",
    atol: float | None = None,
    rtol: float | None = None,
    check: Literal["full", "fast"] = "full",
) -> Comparison:
    """Compare a model with another one, each of any kind, against the reference's own noise floor.

    Args:
        reference: an `nn.Module`, an `ExportedProgram`, or a path or reference of one, or of an ONNX file.
        candidate: the same. An ONNX file gets two rows: `export` (beside another file, `verify`) with ONNX
            Runtime's optimisations off, `runtime` with them on.
        inputs: what both are run on, as for `fold`; drawn or inferred where they are not given.
        device: `auto`, `cpu` or `cuda`; CUDA that cannot run is an error.
        atol: absolute tolerance, instead of the noise floor.
        rtol: tolerance relative to the peak of an output, instead of the noise floor.
        check: on batches of 1, 2 and 3, or (`fast`) on one.

    Raises:
        CheckFailed: there is nothing to compare.
        DeviceError: the device is not there.
    """
    from bntool.pipeline.verifying import compare_models

    subjects = subject_of(reference, inputs), subject_of(candidate, inputs)
    given = None if inputs is None else Inputs.of(inputs)
    checking = Checking(check == "full", device, device, atol, rtol)
    return Comparison(tuple(compare_models(*subjects, given, checking)))
