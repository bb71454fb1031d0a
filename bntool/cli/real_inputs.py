"""`--inputs FILE`: real data as the inputs of a check."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.core.errors import LoadError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from bntool.graph.inputs import Inputs

_BATCH = 32


def read_inputs(path: str, like: Inputs, *, full: bool) -> list[Inputs]:
    """The samples of a file in batches of 1, 2, 3 and then 32; without `full` only the first sample.

    Arrays go to the inputs of the same name, a single one to a single input, in the input's type. Raises
    `LoadError` for a file that cannot be read, `UsageError` for arrays that are not inputs like `like`.
    """
    from bntool.data.arrays import arrays_in, chosen_arrays, tensor_of

    file = Path(path)
    if not file.is_file():
        raise LoadError(f"no such file: {path}", next_step="name an .npy, .npz or .pt file of inputs")
    held = chosen_arrays(arrays_in(file), like, path)
    wanted = like.tensors()
    if len(held) != len(wanted):
        raise UsageError(
            f"{path} holds {len(held)} arrays, and the model takes {len(wanted)}",
            next_step=f"name them {', '.join(wanted)}",
        )
    named = held if set(held) == set(wanted) else dict(zip(wanted, held.values(), strict=True))
    tensors = {name: tensor_of(named[name], path) for name in wanted}
    counts = {len(tensor) for tensor in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(f"the arrays of {path} do not hold equally many samples, one at least")
    (count,) = counts
    ends = [0, 1, *([3, 6] if full else [])]
    ends += range(ends[-1] + _BATCH, count + _BATCH, _BATCH) if full else []
    cuts = [(a, min(b, count)) for a, b in itertools.pairwise(ends) if a < count]
    return [_filled(like, {name: t[a:b] for name, t in tensors.items()}, path) for a, b in cuts]


def _filled(like: Inputs, tensors: dict[str, Tensor], path: str) -> Inputs:
    left = iter(tensors.values())

    def fill(old: Tensor) -> Any:
        given = next(left)
        if given.is_complex() and not old.is_complex():
            raise UsageError(
                f"{path} holds {given.dtype}, and the model takes {old.dtype}",
                next_step="save real numbers: the imaginary parts would be dropped",
            )
        return given.to(old.dtype)

    return dataclasses.replace(like.map(fill), origin=path)
