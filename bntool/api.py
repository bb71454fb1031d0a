"""The public functions. Each is one pass through the flow: observe, plan, apply, check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from bntool.checking import check_onnx, check_surgery, seeded_batches
from bntool.collecting import paused
from bntool.errors import BntoolError, InvariantError, LoadError, PlanError, UsageError
from bntool.exporting import ExportResult
from bntool.exporting import export_onnx as _export_onnx
from bntool.files.regular import read_text
from bntool.inputs import Inputs
from bntool.inserting import InsertOptions, redundant_biases, require_same_places
from bntool.inserting import plan_insert as _plan_insert
from bntool.module_folding import plan_module_fold
from bntool.observe.modules import class_name, signature_of
from bntool.plan import Plan
from bntool.program_folding import ProgramResult, fold_program
from bntool.proving import check_fold, reference_elsewhere
from bntool.reference import Reference
from bntool.report.checks import Comparison
from bntool.report.summary import Summary, summarize
from bntool.results import SurgeryResult
from bntool.surgeries import (
    as_result,
    check_insert,
    fold_observed,
    fold_proved,
    insert_with,
    measured_insert,
    observed,
    on_its_own,
    with_checks,
)
from bntool.surgery.fold_modules import apply_fold
from bntool.surgery.insert_modules import apply_insert

CheckLevel = Literal["full", "fast", "none"]
Progress = Callable[[str], None]


@torch.inference_mode(False)
@paused()
def insert(
    model: nn.Module,
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
    share: bool = False,
) -> SurgeryResult:
    """Insert BatchNorm between convolutions and their activations; what the model computes stays.

    With `init="identity"` the eval output is the same to the last bit, proved by running both.
    `"calibrate"` measures each site on the batches of `data` and keeps eval outputs within rounding, and
    the first training step close; `"default"` is PyTorch's own, for training from scratch. `drop_bias`
    moves every bias that a BatchNorm follows into its running mean, exact in both modes up to rounding.
    `pooling` lets a pooling layer stand between convolution and activation; `per_call` gives a layer that
    runs several times a BatchNorm for each call; `every` and `skip_last` choose among the sites;
    `portable` puts no class of bntool's own into the model. The result's model is new; `share=True` lets
    it share the untouched tensors with `model`. Without `example_inputs` they are inferred from the first
    layer.

    Raises:
        ObserveError: the model does not run on the inputs.
        UsageError: an unknown activation or option.
    """
    options = InsertOptions(
        activations=tuple(activations),
        position=position,
        linear=linear,
        pooling=pooling,
        per_call=per_call,
        include=tuple(include),
        exclude=tuple(exclude),
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
    result = insert_with(model, observed(model, example_inputs, small=True), options)
    if data is not None and result.modified:
        result = measured_insert(model, result, data)
    return result if share else on_its_own(result, model)


@torch.inference_mode(False)
@paused()
def fold(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    check: CheckLevel = "fast",
    share: bool = False,
) -> SurgeryResult | ProgramResult:
    """Fold every BatchNorm that algebra allows into the weights beside it, for inference in eval mode.

    `check="fast"` runs the model before and after on the example inputs in its own precision, and in
    float64 on inputs of other sizes and one sample more; `full` on several seeded batches too; `none`
    trusts the plan. What does not stand up is not folded (reason `not-proved`). `merge` lets blocks that
    bring their own re-parameterisation merge their branches; those of a program merge by law. `unshare`
    clones a layer whose weight others use too for each call site that needs it changed;
    `result.plan.unshared` says what that adds. The result's model is new and in eval mode; `share=True` lets
    it share the untouched tensors with `model`. An `ExportedProgram` is folded as a graph, functional
    BatchNorms too, and gives a `ProgramResult`.

    Raises:
        CheckFailed: the folded model does not compute the same; the first BatchNorm at fault is named.
        ObserveError: the model does not run on the inputs.
    """
    if check not in ("full", "fast", "none"):
        raise UsageError(f"check is {check!r}", next_step='use "full", "fast" or "none"')
    if isinstance(model, ExportedProgram):
        return fold_program(
            model,
            example_inputs=example_inputs,
            include=include,
            exclude=exclude,
            merge=merge,
            unshare=unshare,
            check=check,
        )
    observation = observed(model, example_inputs, small=True)
    options: dict[str, Any] = {"include": include, "exclude": exclude, "merge": merge, "unshare": unshare}
    if check == "none":
        result = fold_observed(model, observation, **options)
    else:
        inputs = [observation.inputs] if check == "fast" else seeded_batches(observation.inputs)
        result = fold_proved(model, observation, Reference(model, inputs), **options)
    return result if share else on_its_own(result, model)


def plan_insert(model: nn.Module, example_inputs: Any = None, **options: Any) -> Plan:
    """What `insert` would do, with nothing changed; takes the options of `InsertOptions`."""
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        chosen = InsertOptions(**given)
    except TypeError as error:
        raise UsageError(f"unknown option: {error}") from error
    return _plan_insert(observed(model, example_inputs, small=True).graph, chosen)


def plan_fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> Plan:
    """What `fold` would do, with nothing changed."""
    observation = observed(model, example_inputs, small=True)
    return plan_module_fold(
        model, observation, include=include, exclude=exclude, merge=merge, unshare=unshare
    ).plan


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
        PlanError: the plan was made for another model; the first difference is named.
        CheckFailed: the plan does not hold on this model.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    plan.require_signature(signature_of(model), class_name(type(model)))
    if plan.action == "insert":
        observation = observed(model, example_inputs, small=True) if check != "none" and plan else None
        if observation is not None:
            require_same_places(observation.graph, plan)
        try:
            modified = apply_insert(model, plan)
        except KeyError as error:
            raise PlanError(f"this plan is damaged: it lacks, or this model lacks, {error}") from error
        except InvariantError as error:
            raise PlanError(f"this plan is damaged: {error}") from error
        result = as_result(model, modified, plan, None)
        if observation is not None and plan.options.get("init") != "default":
            rows = check_insert(model, result.model, plan, observation.inputs, full=check == "full")
            result = with_checks(result, rows)
    else:
        result = as_result(model, apply_fold(model, plan), plan, None)
        if check != "none" and plan:
            inputs = observed(model, example_inputs, small=True).inputs
            reference = Reference(model, [inputs] if check == "fast" else seeded_batches(inputs))
            elsewhere = reference_elsewhere(model, inputs)
            result = with_checks(result, check_fold(model, result.model, plan, reference, elsewhere))
    return result if share else on_its_own(result, model)


def read_plan(path: str | Path) -> Plan:
    """A plan from a plan file, or from the side file that `insert` and `fold` write."""
    import json

    try:
        data = json.loads(read_text(path))
    except LoadError as error:
        raise PlanError(error.what, next_step=error.next_step) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"cannot read a plan from {path}: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no plan")
    return Plan.from_dict(data)


def summary(
    model: nn.Module, example_inputs: Any = None, *, baseline: nn.Module | Summary | None = None
) -> Summary:
    """Layers, shapes and exact counts of a model; with a baseline, the difference too.

    Without `example_inputs` they are inferred; where that fails the shapes stay blank.
    """
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    idle: list[str] = []
    with contextlib.suppress(BntoolError):
        observation = observed(model, example_inputs)
        inputs = observation.inputs
        idle = [dropped.conv for dropped in redundant_biases(observation.graph)]
    return summarize(model, inputs, baseline=baseline, idle_biases=idle)


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
) -> Path:
    """Write the model in eval mode as ONNX, weights named by qualified name; no BatchNorm is folded here.

    `opset` and `ir_version` are the lowest that work unless given. `dynamic` names axes to leave open
    besides the batch, by input: `{"input": (2, 3)}`. `dtype` casts weights, inputs and outputs; with
    `keep_io` inputs and outputs stay float32. `exporter="legacy"` traces.

    Raises:
        ExportError: the model cannot be exported, or its numbers do not fit `dtype`.
        UsageError: an axis or an IR version that there is not.
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
    ).path


def exported(model: nn.Module, example_inputs: Any, path: str | Path, **options: Any) -> ExportResult:
    """`export_onnx`, with everything it found out."""
    return _export_onnx(model, Inputs.of(example_inputs), path, **options)


def verify(
    reference: nn.Module,
    candidate: nn.Module | str | Path,
    inputs: Any = None,
    *,
    device: str = "auto",
    atol: float | None = None,
    rtol: float | None = None,
) -> Comparison:
    """Compare a model with another model or with an ONNX file, against the reference's own noise floor.

    An ONNX candidate gets two rows: `export` with ONNX Runtime's optimisations off, `runtime` with them on.
    """
    example = Inputs.of(inputs) if inputs is not None else observed(reference, None).inputs
    batches = seeded_batches(example)
    if isinstance(candidate, nn.Module):
        on = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        rows = check_surgery(reference, candidate, batches, stage="verify", device=on, atol=atol, rtol=rtol)
    else:
        rows = check_onnx(reference, candidate, batches, device=device, atol=atol, rtol=rtol)
    return Comparison(tuple(rows))
