"""Inputs for an ONNX file, made up by the shapes and types that it declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from bntool.core.errors import CheckFailed, ExportError
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs
from bntool.runtime.runner import FileRunner

SIDES = (64, 96, 224, 256, 16, 24, 8, 5)
"""Lengths for the axes, other than the batch, that a file leaves open: the first ones that it takes."""
_TYPES = {
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bfloat16)": torch.bfloat16,
}


@dataclasses.dataclass
class FirstRuns:
    """Inputs that a file takes, of several sizes where it leaves axes open, and what it gives on them.

    `refused` tells why it did not take the first that it refused.
    """

    inputs: list[Inputs] = dataclasses.field(default_factory=list)
    outputs: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    refused: str = ""


def first_runs(
    runner: FileRunner, count: int, seed: int = 0, shapes: Mapping[str, Sequence[int | None]] | None = None
) -> FirstRuns:
    """Run a file on seeded inputs until it has taken `count` of them, of other sizes each time.

    `shapes` says how large some of them are. Raises as `drawn_inputs`.
    """
    sides = enumerate(SIDES, 1)
    drawn = (drawn_inputs(runner, min(batch, 3), side, seed + batch, shapes) for batch, side in sides)
    return runs_of(runner, drawn, count)


def runs_of(runner: FileRunner, several: Iterable[Inputs], count: int | None = None) -> FirstRuns:
    """Run a file on inputs until it has taken `count` of them; on all of them without."""
    found = FirstRuns()
    for inputs in several:
        try:
            outputs = runner.run(inputs)
        except ExportError as error:
            found.refused = found.refused or error.what
            continue
        found.inputs.append(inputs)
        found.outputs.append(outputs)
        if len(found.inputs) == count:
            break
    return found


def drawn_inputs(
    runner: FileRunner,
    batch: int,
    side: int,
    seed: int,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> Inputs:
    """Seeded inputs of the shapes that a file declares, or of `shapes` for those that it names.

    An open first axis is the batch; None is an axis that `shapes` leaves open too.

    Axes of one name get one length. Raises `CheckFailed` for an input that is no tensor of numbers.
    """
    draw = Draw(seed)
    lengths: dict[str, int] = {}
    named: dict[str, Any] = {}
    for name, kind, axes in runner.signature:
        if not kind.startswith("tensor(") or "string" in kind:
            raise CheckFailed(
                f"no input can be made up for {name}, which is a {kind}",
                next_step="fold it with --check none, and verify the result with inputs of your own",
            )
        given = (shapes or {}).get(name)
        if given is not None:
            open_batch = not axes or not isinstance(axes[0], int)
            axes = [None, *given[1:]] if axes and open_batch else list(given)
        shape = []
        for i, axis in enumerate(axes):
            length = batch if i == 0 else side
            known = lengths.setdefault(axis, length) if isinstance(axis, str) else length
            shape.append(axis if isinstance(axis, int) else known)
        of_torch = kind.removeprefix("tensor(").removesuffix(")")
        dtype = getattr(torch, of_torch) if of_torch.startswith(("int", "uint", "bool")) else None
        named[name] = draw.numbers(shape, dtype or _TYPES.get(kind, torch.float32))
    return Inputs((), named, origin="the shapes that the file declares")
