"""The layers of which only tensors are known: a file of weights tells what its names and shapes tell."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bntool.files.stored import Described
from bntool.results.counting import Counts
from bntool.results.layers import Layer

Kind = Literal["trainable", "frozen", "buffer", "constant"]
Size = tuple[int, ...]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A parameter (`trainable` or `frozen`), a buffer or a constant, by qualified name.

    A tensor that stands under several names has its elements and bytes under the first.
    """

    name: str
    kind: Kind
    shape: Size
    dtype: str
    elements: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shape": list(self.shape)}

    @property
    def counts(self) -> Counts:
        """A constant is none of what is counted: only its bytes are."""
        named = {"buffer": "buffers"}.get(self.kind, self.kind)
        held = {} if self.kind == "constant" else {named: self.elements}
        return Counts(**held, bytes=self.bytes)


@dataclasses.dataclass(frozen=True)
class Found:
    """The layers of a model that is no module, its tensors, and how many BatchNorms it has."""

    layers: tuple[Layer, ...]
    tensors: tuple[StoredTensor, ...]
    batch_norms: int
    input_shapes: tuple[Size, ...] = ()
    input_bytes: int | None = None
    notes: tuple[str, ...] = ()


def of_weights(described: Mapping[str, Described]) -> Found:
    """A file of weights without its model: types by what stands together, and no shapes of inputs."""
    described = _in_order(described)
    tensors = [
        StoredTensor(
            name, "buffer" if name.rpartition(".")[2] in _STATISTICS else "trainable", one.shape, one.dtype,
            math.prod(one.shape), one.nbytes,
        )
        for name, one in described.items()
    ]  # fmt: skip
    owners = {tensor.name: tensor.name.rpartition(".")[0] for tensor in tensors}
    layers = rows_of({}, tensors, owners)
    norms = sum(layer.type.startswith("BatchNorm") for layer in layers)
    said = (
        "weights without their model: types are read from names and shapes, what is trained is not known "
        "(--arch names the model)"
    )
    return Found(tuple(layers), tuple(tensors), norms, notes=(said,))


def _in_order(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """By name, numbers as numbers, where a file is sorted by names or types, as safetensors files are."""
    owners = [name.rpartition(".")[0] for name in described]
    if len(list(itertools.groupby(owners))) == len(set(owners)) and list(described) != sorted(described):
        return described
    return {name: described[name] for name in sorted(described, key=lambda n: re.sub(r"\d+", _padded, n))}


def _padded(number: re.Match[str]) -> str:
    return number[0].zfill(20)


def rows_of(
    seen: Mapping[str, Layer], tensors: Iterable[StoredTensor], owners: Mapping[str, str]
) -> list[Layer]:
    """The layers that were seen, each with its tensors; then those of which only tensors are known."""
    held: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        held.setdefault(owners[tensor.name], []).append(tensor)
    rows = []
    for number, name in enumerate(dict.fromkeys([*seen, *held]), start=1):
        own = held.get(name, [])
        row = seen.get(name) or Layer(0, name, _type_by_tensors(own))
        rows.append(
            dataclasses.replace(
                row,
                number=number,
                counts=sum((tensor.counts for tensor in own), Counts()),
                buffer_bytes=sum(tensor.bytes for tensor in own if tensor.kind in ("buffer", "constant")),
                own_shapes=tuple(tensor.shape for tensor in own if tensor.elements),
                kernel=row.kernel if name in seen else _kernel_by_tensors(own),
            )
        )
    return rows


def _type_by_tensors(tensors: Sequence[StoredTensor]) -> str:
    """What a layer without a class must be, as far as its tensors tell."""
    local = {tensor.name.rpartition(".")[2]: tensor for tensor in tensors}
    if "running_mean" in local:
        return "BatchNorm"
    axes = len(local["weight"].shape) if "weight" in local else 0
    return {2: "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}.get(axes, "tensors")


def _kernel_by_tensors(tensors: Sequence[StoredTensor]) -> Size | None:
    weight = next((t for t in tensors if t.name.rpartition(".")[2] == "weight"), None)
    return weight.shape[2:] if weight is not None and len(weight.shape) > 2 else None
