"""What a model is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bntool.api.asked import Model
from bntool.core.command_options import ViewOptions
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs
from bntool.pipeline.summarising import summarized
from bntool.results.summary import Summary
from bntool.subjects import subject_of


def summary(
    model: Model,
    example_inputs: Any = None,
    *,
    baseline: Model | Summary | None = None,
    depth: int | None = None,
    columns: Sequence[str] | None = None,
    sort: str | None = None,
    tree: bool = False,
) -> Summary:
    """Layers, shapes, exact counts and costs of a model; with a baseline, the difference too.

    Shapes are of one forward pass in eval mode, on a copy that leaves no trace; mult-adds, kernel sizes and
    activations are counted by torchinfo. A forward that fails is a note, with the shapes up to there.

    Args:
        model: of any kind: an `nn.Module`, an `ExportedProgram`, TorchScript, or a path or reference; also a
            file of weights without its model, or one whose classes are not here, which is not run.
        example_inputs: as everywhere, or a size such as `(1, 3, 224, 224)`, or a list of sizes, of float32
            noise; inferred where they are not given, and where that fails the shapes stay blank.
        baseline: a model of any kind, or its summary, to compare with.
        depth: show so many levels of modules; the last stand for what they hold.
        columns: those to show, of type, name, input, output, kernel, params, percent, trainable, frozen,
            buffers, mult-adds and bytes.
        sort: by this column, the largest first.
        tree: show the tree of modules.

    Raises:
        UsageError: there is no such column, depth or size.
        LoadError: the file cannot be loaded.
    """
    view = ViewOptions(depth=depth, sort=sort, tree=tree)
    if columns is not None:
        view = dataclasses.replace(view, columns=tuple(columns))
    view.validate()  # before any work
    compared = baseline if baseline is None or isinstance(baseline, Summary) else _opened(baseline)
    inputs = _inputs_of(example_inputs, model)
    subject = _opened(model, inputs)
    return dataclasses.replace(summarized(subject, inputs, baseline=compared), view=view)


def _opened(model: Any, inputs: Inputs | None = None) -> Any:
    return subject_of(model, inputs, stand_ins=True, bare=True)


def _inputs_of(given: Any, model: Any) -> Inputs | None:
    """Inputs as they are, or noise of the sizes that stand in their place."""
    if given is None:
        return None
    sizes = [given] if _is_size(given) else given
    if not isinstance(sizes, list | tuple) or not sizes or not all(map(_is_size, sizes)):
        return Inputs.of(given)
    draw = Draw()
    drawn = Inputs(tuple(draw.numbers(size, torch.float32) for size in sizes))
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return drawn.to(dtype=next((p.dtype for p in parameters if p.is_floating_point()), None))


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(n) is int and n >= 0 for n in value)
