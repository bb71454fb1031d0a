"""Insert and fold, and what they would do: each takes a model of any kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from bntool.api.asked import CheckLevel, Model, checking_of, names_of, owned
from bntool.core.collecting import paused
from bntool.core.errors import UsageError
from bntool.core.options import FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.pipeline import surgeries
from bntool.results.results import SurgeryResult
from bntool.subjects import subject_of


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
        activations=names_of(activations, "activations"),
        position=position,
        linear=linear,
        pooling=pooling,
        per_call=per_call,
        include=names_of(include, "include"),
        exclude=names_of(exclude, "exclude"),
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
    result, _ = surgeries.insert(subject, options, checking_of(check))
    if data is not None and result.modified:
        result = surgeries.measured_insert(subject, result, data)
    return owned(result, subject, share)


@torch.inference_mode(False)
@paused()
def fold(
    model: Model,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool | None = None,
    bake: bool = False,
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
            `result.plan.unshared` says what that adds. None: in ONNX files alone.
        bake: first store the weights that layers compute from parameters alone (weight and spectral
            normalisation, pruning, weight standardisation); training then no longer goes through what
            computed them, and the plan says which.
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
    options = FoldOptions(names_of(include, "include"), names_of(exclude, "exclude"), merge, unshare, bake)
    subject = subject_of(model, example_inputs, options).prepared(options)
    checking = checking_of(check)
    proof = None if checking is None else subject.proof(checking)
    result, _ = surgeries.fold(subject, options, proof)
    return owned(result, subject, share)


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
    unshare: bool | None = None,
    bake: bool = False,
) -> Plan:
    """What `fold` would do, with nothing changed; its arguments are those of `fold`."""
    options = FoldOptions(names_of(include, "include"), names_of(exclude, "exclude"), merge, unshare, bake)
    return subject_of(model, example_inputs, options).prepared(options).plan_fold(options, thorough=True)
