"""The public functions. Each takes a model of any kind, and is one pass: observe, plan, apply, check."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from bntool.core.errors import BntoolError, DamagedPlan, PlanError, UsageError
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.schema import Damaged, read
from bntool.export.exporting import ExportResult
from bntool.export.exporting import export_onnx as _export_onnx
from bntool.files.targets import Target
from bntool.graph.inputs import Inputs
from bntool.inserting import redundant_biases, require_same_places
from bntool.models.collecting import paused
from bntool.observe.modules import class_name, signature_of
from bntool.pipeline import surgeries
from bntool.pipeline.serving import Serving, Silent, served
from bntool.report.checks import Comparison
from bntool.report.results import SurgeryResult
from bntool.report.summary import Summary, summarize
from bntool.subjects import subject_of
from bntool.subjects.base import Checking, Narrow, Subject
from bntool.subjects.module import ModuleSubject
from bntool.surgery.replaying import replay_fold, replay_insert

CheckLevel = Literal["full", "fast", "none"]
Progress = Callable[[str], None]
Model = nn.Module | ExportedProgram | str | Path
"""A model of any kind: one in memory, or the name of a file or of code that makes one."""


@torch.inference_mode(False)
@paused()
def insert(
    model: Model,
    example_inputs: Any = None,
    *,
    activations: Sequence[str] = ("relu",),
    position: Literal["before", "after"] = "before",
    init: Literal["identity", "calibrate", "default"] = "identity",
    data: Iterable[Any] | None = None,
    affine: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
    drop_bias: bool = False,
    linear: bool = False,
    pooling: bool = False,
    per_call: bool = False,
    sync: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    every: int = 1,
    skip_last: bool = False,
    keep_keys: bool = False,
    portable: bool = False,
    check: CheckLevel = "fast",
    share: bool = False,
) -> SurgeryResult:
    """Insert BatchNorm between convolutions and their activations; what the model computes stays.

    With `init="identity"` the eval output is the same to the last bit, proved by running both.

    Args:
        model: an `nn.Module`, an `ExportedProgram`, or a path or reference of one, or of an ONNX file. A
            program and a file take identity-initialised BatchNorms alone.
        example_inputs: a tensor, a tuple of positional inputs, or `(args, kwargs)`, in the shapes that the
            model takes; inferred from its first layer where they are not given.
        activations: kinds (`relu`, `silu`, …) or `any`.
        position: which side of the activation.
        init: `"calibrate"` measures each site on the batches of `data` and keeps eval outputs within rounding
            and the first training step close, `"default"` is PyTorch's own, for training from scratch.
        data: batches, with `init="calibrate"`.
        affine: whether the new layers have γ and β.
        eps: ε of the new layers.
        momentum: of the new layers.
        drop_bias: move every bias that a BatchNorm follows into its running mean: exact in either mode,
            up to rounding.
        linear: after linear layers too.
        pooling: let a pooling layer stand between convolution and activation.
        per_call: give a layer that runs several times a BatchNorm for each call.
        sync: SyncBatchNorm, for training on several GPUs.
        include: patterns for names of layers.
        exclude: the same, of layers to leave out.
        every: of the sites found, every N-th, the first included.
        skip_last: leave out the last site.
        keep_keys: name newcomers `0_bn`, so that no old key moves.
        portable: put no class of bntool's own into the model.
        check: `fast` on the example; `full` on batches of 1, 2 and 3; `none`.
        share: let the result share the untouched tensors with `model`.

    Returns:
        A result whose model is new, in the mode of the old one.

    Raises:
        ObserveError: the model does not run on the inputs.
        UsageError: an unknown activation or option, or one that this kind of model does not know.
        CheckFailed: the output is not the same.
    """
    options = InsertOptions(
        activations=_names(activations, "activations"),
        position=position,
        linear=linear,
        pooling=pooling,
        per_call=per_call,
        include=_names(include, "include"),
        exclude=_names(exclude, "exclude"),
        every=every,
        skip_last=skip_last,
        keep_keys=keep_keys,
        portable=portable,
        drop_bias=drop_bias,
        affine=affine,
        eps=eps,
        momentum=momentum,
        init=init,
        sync=sync,
    )
    if (init == "calibrate") != (data is not None):
        raise UsageError('init="calibrate" and data go together', next_step="pass both, or neither of them")
    subject = subject_of(model, example_inputs, options)
    result, _ = surgeries.insert(subject, options, _checking(check))
    if data is not None and result.modified and isinstance(subject, ModuleSubject):
        result = surgeries.measured_insert(subject, result, data)
    return _owned(result, subject, share)


@torch.inference_mode(False)
@paused()
def fold(
    model: Model,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    check: CheckLevel = "fast",
    share: bool = False,
) -> SurgeryResult:
    """Fold every BatchNorm that algebra allows into the weights beside it, for inference in eval mode.

    What does not stand up is not folded (reason `not-proved`).

    Args:
        model: an `nn.Module`, an `ExportedProgram`, TorchScript, or a path or reference of one, or of an ONNX
            file. A program and a file are folded as graphs, functional BatchNorms too.
        example_inputs: a tensor, a tuple of positional inputs, or `(args, kwargs)`, in the shapes that the
            model takes; inferred where they are not given, and drawn for an ONNX file.
        include: patterns for names of BatchNorms.
        exclude: the same, of BatchNorms to leave out.
        merge: let blocks that bring their own re-parameterisation merge their branches; those of a program or
            a file merge by law.
        unshare: clone a layer whose weight others use too for each call site that needs it changed;
            `result.plan.unshared` says what that adds.
        check: `fast` runs the model before and after on the example inputs in its own precision, and in
            float64 on inputs of other sizes and one sample more; `full` on batches of 1, 2 and 3 too; `none`
            trusts the plan.
        share: let the result share the untouched tensors with `model`.

    Returns:
        A result whose model is new and in eval mode.

    Raises:
        CheckFailed: the folded model does not compute the same, and no BatchNorm is at fault.
        ObserveError: the model does not run on the inputs.
        UsageError: an option that this kind of model does not know.
    """
    options = FoldOptions(_names(include, "include"), _names(exclude, "exclude"), merge, unshare)
    subject = subject_of(model, example_inputs, options)
    checking = _checking(check)
    proof = None if checking is None else subject.proof(checking)
    result, _ = surgeries.fold(subject, options, proof)
    return _owned(result, subject, share)


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
    target = Target(force=force)
    claimed = target.claim(path)
    checking = _checking(asked.check)
    proof: Any = None
    if checking is not None:
        checking = dataclasses.replace(
            checking, atol=asked.atol, rtol=asked.rtol, tf32=asked.tf32 == "both", axes=how.axes()
        )
        proof = subject.proof(checking)
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


def plan_insert(model: Model, example_inputs: Any = None, **options: Any) -> Plan:
    """What `insert` would do, with nothing changed; takes the options of `InsertOptions`."""
    chosen = InsertOptions.of(options)
    return subject_of(model, example_inputs, chosen).plan_insert(chosen)


def plan_fold(
    model: Model,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> Plan:
    """What `fold` would do, with nothing changed; its arguments are those of `fold`."""
    options = FoldOptions(_names(include, "include"), _names(exclude, "exclude"), merge, unshare)
    return subject_of(model, example_inputs, options).plan_fold(options, thorough=True)


@torch.inference_mode(False)
def apply(
    model: nn.Module,
    plan: Plan | str | Path,
    example_inputs: Any = None,
    *,
    check: CheckLevel = "fast",
    share: bool = False,
) -> SurgeryResult:
    """Replay a plan on a fresh model of the same architecture, and check what it did there.

    A fold plan rests on signs, paddings and hooks of the model it was made for; so a replayed fold is
    checked like a new one, unless `check="none"`. An insertion must find each of its places again, and with
    `init="identity"` it is held to the bit.

    Raises:
        DamagedPlan: the plan is none, or names what the model has not; where in it is told.
        PlanError: the plan was made for another model; the first difference is named.
        CheckFailed: the plan does not hold on this model.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    plan.require_signature(signature_of(model), class_name(type(model)))
    subject = ModuleSubject(model, example_inputs)
    checking = _checking(check)
    if plan.action == "insert" and checking is not None and plan:
        require_same_places(subject.graph(), plan)
    try:
        replay = replay_insert if plan.action == "insert" else replay_fold
        result = surgeries.replayed(subject, plan, replay(model, plan), checking)
    except Damaged as error:
        raise DamagedPlan.of(error.why, error.place) from error
    return _owned(result, subject, share)


def _names(names: Sequence[str], option: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"{option} is a tuple of names, not one string")
    return tuple(names)


def _checking(level: CheckLevel) -> Checking | None:
    CheckOptions(check=level).validate()
    return None if level == "none" else Checking(full=level == "full")


def _owned(result: SurgeryResult, subject: Subject, share: bool) -> SurgeryResult:
    """The result of a module with tensors of its own, unless it may share them."""
    return result if share or subject.kind != "module" else surgeries.on_its_own(result, subject.model)


def read_plan(path: str | Path) -> Plan:
    """A plan from a plan file, or from the side file that `insert` and `fold` write.

    Raises:
        DamagedPlan: the file holds no plan; where in it the fault is.
        PlanError: the file cannot be read, or is of a newer bntool.
    """
    prefix = ""
    try:
        data = read(Path(path))
        if isinstance(data, dict) and isinstance(data.get("plan"), dict):
            data, prefix = data["plan"], "plan."
        return Plan.from_dict(data)
    except OSError as error:
        raise PlanError(
            f"cannot read a plan from {path}: {error.strerror}", next_step="name a plan"
        ) from error
    except Damaged as error:
        raise DamagedPlan.of(error.why, str(path)) from error
    except DamagedPlan as error:
        error.where = f"{path}, {prefix}{error.where}" if error.where else str(path)
        raise


def summary(model: Model, example_inputs: Any = None, *, baseline: nn.Module | Summary | None = None) -> Any:
    """Layers, shapes and exact counts of a model; with a baseline, the difference too.

    Args:
        model: an `nn.Module` (a `Summary`), an `ExportedProgram` or an ONNX file (a `ProgramSummary`: its
            tensors by name), or a path or reference of one.
        example_inputs: inferred where they are not given; where that fails the shapes stay blank.
        baseline: what a module is compared with.
    """
    subject = subject_of(model, example_inputs)
    if not isinstance(subject, ModuleSubject):
        from bntool.report.program_summary import summarize_onnx, summarize_program
        from bntool.subjects.onnx import OnnxSubject

        return (
            summarize_onnx(subject.observed)
            if isinstance(subject, OnnxSubject)
            else summarize_program(subject.model)
        )
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    idle: list[str] = []
    with contextlib.suppress(BntoolError):
        observation = ModuleSubject(subject.model, example_inputs, small=False).observation
        inputs = observation.inputs
        idle = [dropped.conv for dropped in redundant_biases(observation.graph)]
    return summarize(subject.model, inputs, baseline=baseline, idle_biases=idle)


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
