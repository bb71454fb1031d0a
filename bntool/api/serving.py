"""From a model to a file that is served, and models compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bntool.api.asked import Model
from bntool.core.collecting import paused
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions
from bntool.core.tolerances import Tolerance
from bntool.export.exporting import ExportResult
from bntool.files.onnx_files import put_onnx
from bntool.files.targets import Target
from bntool.graph.inputs import Inputs
from bntool.pipeline import surgeries
from bntool.pipeline.serving import Serving, Silent, placed, served
from bntool.pipeline.serving import exported as export_draft
from bntool.results.checks import Comparison
from bntool.results.results import SurgeryResult
from bntool.subjects import subject_of
from bntool.subjects.base import Checking


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
    force: bool = False,
) -> SurgeryResult:
    """The whole way of `bntool fold --export onnx`: fold, prove, export, verify.

    Args:
        model: an `nn.Module`, an `ExportedProgram` or TorchScript, or a path or reference of one.
        path: where the ONNX file goes; nothing is written unless every stage passes.
        example_inputs: as for `fold`.
        fold: which BatchNorms may go; by default all.
        export: what the file is to be like.
        check: how much is verified, and by what limit; by default on batches of 1, 2 and 3.
        force: whether `path` may be replaced.

    Returns:
        The result of the fold, with the checks of all stages and what was exported in `export`. Where nothing
        folds, the model is exported as it is.

    Raises:
        CheckFailed: a stage does not compute the same.
        ExportError: the model cannot be exported, or the file does not run.
        UsageError: an option that this kind of model does not know, or a `path` that may not be written.
    """
    options, how, asked = fold or FoldOptions(), export or ExportOptions(), check or CheckOptions()
    subject = subject_of(model, example_inputs, options, how, asked).exportable(how).prepared(options)
    target = Target(force=force, reads=subject.files)
    place = target.claim(path)
    checking = Checking.of(asked, axes=how.axes())
    proof: Any = None if checking is None else subject.proof(checking)
    result, after = surgeries.fold(subject, options, proof)
    pair = None if checking is None else (proof.reference, checking)
    return _written(
        target, place, lambda draft: served(after, result, draft, Serving(how, options), pair, Silent())
    )


def export_onnx(
    model: Model,
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

    Nothing is compared: that is `verify(model, path)`.

    Args:
        model: an `nn.Module`, an `ExportedProgram` or TorchScript, or a path or reference of one; the path of
            an ONNX file with an `opset`, to which ONNX's own converter brings it.
        example_inputs: as for `fold`.
        path: where the file goes; weights of more than 1.8 GiB go into a second file beside it.
        opset: the lowest that works unless given.
        ir_version: the lowest for the opset unless given.
        dynamic_batch: whether the leading axis of the inputs stays open, where torch can make it so.
        dynamic: axes to leave open besides the batch, by input: `{"input": (2, 3)}`.
        external_data: whether weights go into a second file; `auto`: above 1.8 GiB.
        dtype: `fp16` or `bf16` casts weights, inputs and outputs; empty for the model's own type.
        keep_io: with `dtype`, inputs and outputs stay float32.
        exporter: `legacy` traces, for what torch.export cannot take.
        force: whether `path` may be replaced.

    Returns:
        The path.

    Raises:
        ExportError: the model cannot be exported, or its numbers do not fit `dtype`.
        UsageError: an axis or an IR version that there is not; an option that this kind of model does not
            know; a `path` that exists without `force`.
    """
    how = ExportOptions(
        opset=opset,
        ir_version=ir_version,
        static_batch=not dynamic_batch,
        dynamic=tuple(f"{name}:{','.join(map(str, axes))}" for name, axes in (dynamic or {}).items()),
        external_data=external_data,
        dtype=dtype or None,
        keep_io=keep_io,
        exporter=exporter,
    )
    exported(model, example_inputs, path, how, force=force)
    return Path(path)


@torch.inference_mode(False)
def exported(
    model: Model,
    example_inputs: Any,
    path: str | Path,
    how: ExportOptions | None = None,
    *,
    force: bool = False,
) -> ExportResult:
    """`export_onnx`, with everything it found out; its options in one object."""
    how = how or ExportOptions()
    subject = subject_of(model, example_inputs, how, command="export").exportable(how)
    target = Target(force=force, reads=subject.files)
    place = target.claim(path)
    serving = Serving(how)
    before = surgeries.unchanged(subject)
    result = _written(
        target,
        place,
        lambda draft: dataclasses.replace(
            before, export=export_draft(subject, before, draft, serving, Silent())
        ),
    )
    assert result.export is not None
    return result.export


def _written(target: Target, place: Path, write: Callable[[Path], SurgeryResult]) -> SurgeryResult:
    """What `write` exports into a draft, in its claimed place."""
    with target.drafts() as drafts:
        result = write(drafts.folder_for(place) / place.name)
        assert result.export is not None
        put_onnx(result.export.path, result.export.data_path, place, drafts)
    return placed(result, place, place, drafts)


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
        rtol: relative tolerance, instead of the noise floor: no element may lie further off than
            atol + rtol · peak, the largest absolute value of its output.
        check: on batches of 1, 2 and 3, or (`fast`) on one.

    Raises:
        CheckFailed: there is nothing to compare.
        DeviceError: the device is not there.
    """
    from bntool.pipeline.verifying import compare_models

    subjects = subject_of(reference, inputs), subject_of(candidate, inputs)
    given = None if inputs is None else Inputs.of(inputs)
    checking = Checking(check == "full", device, device, Tolerance(atol, rtol))
    return Comparison(tuple(compare_models(*subjects, given, checking)))
