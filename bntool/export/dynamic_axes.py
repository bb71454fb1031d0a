"""Which axes of the inputs are to stay open in an exported file, and what they are called there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.core.errors import UsageError
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs

BATCH_AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class DynamicAxes:
    """`batch`: the leading axis of every input, where torch can make it so. `asked`: axes by input name.

    What is asked for by name must become dynamic, or the export fails; the batch axis may end up fixed.
    """

    batch: bool = True
    asked: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def named_for(self, inputs: Inputs) -> dict[str, tuple[int, ...]]:
        """The axes asked for, checked against the inputs; axes counted from 0.

        Raises `UsageError` for an input that there is not, or an axis that it does not have.
        """
        tensors = inputs.tensors()
        for name, axes in self.asked.items():
            if name not in tensors:
                raise UsageError(
                    f"there is no input named {name or 'so'} to make dynamic",
                    next_step=f"the inputs are {', '.join(tensors)}",
                )
            rank = tensors[name].dim()
            wrong = [axis for axis in axes if not 0 <= axis < rank]
            if wrong:
                shape = "x".join(map(str, tensors[name].shape))
                raise UsageError(
                    f"{name} ({shape}) has no axis {wrong[0]} to make dynamic",
                    next_step=f"its axes are 0 to {rank - 1}",
                )
        return {name: tuple(sorted(set(axes))) for name, axes in self.asked.items() if axes}


def name_of(tensor: str, axis: int) -> str:
    """What an axis asked for is called in the file; the leading one is the batch."""
    return f"{tensor}_{axis}" if axis else BATCH_AXIS


def resized(inputs: Inputs, axes: Mapping[str, Sequence[int]], by: int, seed: int = 0) -> Inputs:
    """Seeded inputs like these, with the named axes longer by `by`."""
    draw = Draw(seed)
    names = {id(tensor): name for name, tensor in inputs.tensors().items()}

    def drawn(t: Tensor) -> Tensor:
        longer = axes.get(names.get(id(t), ""), ())
        return draw.like(t, [n + by if i in longer else n for i, n in enumerate(t.shape)])

    return inputs.map(drawn) if axes else inputs


def sample_for(inputs: Inputs, axes: Mapping[str, Sequence[int]]) -> Inputs:
    """Inputs whose named axes are longer than 1: torch takes an axis of length 0 or 1 for a constant."""
    tensors = inputs.tensors()
    short = {name: [a for a in of if tensors[name].shape[a] < 2] for name, of in axes.items()}
    return resized(inputs, {name: of for name, of in short.items() if of}, by=2)


def shapes_for(inputs: Inputs, batch: Any, axes: Mapping[str, Sequence[int]]) -> Any:
    """The axes as torch.export takes them; `batch` is the dimension of every leading axis, or None."""
    shapes = torch.export.ShapesCollection()
    for name, tensor in inputs.tensors().items():
        dims: dict[int, Any] = dict.fromkeys(axes.get(name, ()), torch.export.Dim.DYNAMIC)
        if batch is not None and tensor.dim():
            dims[0] = batch
        if dims:
            shapes[tensor] = dims
    return shapes


def symbols_of(
    program: torch.export.ExportedProgram, inputs: Inputs, axes: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Each of torch's own symbols for an open axis -> the name of the axis; the first place decides."""
    taken = set(program.graph_signature.user_inputs)
    given = (node.meta.get("val") for node in program.graph.nodes if node.name in taken)
    values = [value for value in given if isinstance(value, Tensor)]
    found: dict[str, str] = {}
    for (name, _), value in zip(inputs.tensors().items(), values, strict=False):
        for axis in range(value.dim()):
            if not isinstance(value.shape[axis], int) and (axis == 0 or axis in axes.get(name, ())):
                found.setdefault(str(value.shape[axis]), name_of(name, axis))
    return found
