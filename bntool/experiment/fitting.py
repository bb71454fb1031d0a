"""Whether a model, its data and the processes fit together, found out before the first step."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from bntool.core.errors import UsageError
from bntool.experiment.samples import Data
from bntool.experiment.settings import Settings
from bntool.experiment.training import logits_of
from bntool.observe.isolation import Isolation
from bntool.runtime.process_group import World


def fitting(model: nn.Module, data: Data) -> Data:
    """The data with as many classes as the model tells apart, after running the model on two samples."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "no parameter of the model is trainable",
            where=type(model).__name__,
            next_step="call model.requires_grad_() before saving it",
        )
    moved = data.inputs_for(model)
    try:
        with Isolation(model).run() as run, torch.no_grad():
            output = logits_of(run(moved.clone()))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        integers = (
            "; these are whole numbers: astype('float32') / 255" if not moved.is_floating_point() else ""
        )
        raise UsageError(
            f"the model fails on samples of shape {'x'.join(map(str, moved.shape[1:]))}: {lines[0]}",
            where=data.origin,
            next_step=f"give data of the shape and type that the model takes{integers}",
        ) from error
    if output.dim() != 2 or len(output) != len(moved) or output.shape[1] < 2:
        raise UsageError(
            f"the model puts out {list(output.shape)} for {len(moved)} samples, not (N, classes)",
            where=type(model).__name__,
            next_step="give a model that classifies: one row for each sample, one column for each class",
        )
    classes = output.shape[1]
    most = max((int(labels.max()) for labels in data.labels), default=0) if data.labels else 0
    if most >= classes:
        raise UsageError(
            f"the labels go up to {most}, and the model tells {classes} classes apart (0 to {classes - 1})",
            where=data.origin,
            next_step="number the classes from 0, or give the model as many outputs",
        )
    notes = data.notes
    sums = output.float().sum(1)
    if bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-3):
        notes += ("the model puts out probabilities, which the loss takes for logits: leave its softmax out",)
    return dataclasses.replace(data, classes=classes, notes=notes)


def require_shares(data: Data, settings: Settings, world: World) -> None:
    least = 2 * world.size
    for what, count in (("a batch", settings.batch_size), ("the training data", len(data.train))):
        if world.size > 1 and count < least:
            raise UsageError(
                f"{what} holds {count} samples for {world.size} processes",
                next_step=f"it must be {least} or more: BatchNorm needs two samples in each process",
            )
