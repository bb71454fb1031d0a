"""Exact counts of parameters and buffers: every stored tensor once, at the first place that holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy


@dataclasses.dataclass(frozen=True)
class Counts:
    """Elements that are trainable, frozen (parameters without gradient) and buffers; and all their bytes."""

    trainable: int = 0
    frozen: int = 0
    buffers: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self._values(), other._values(), strict=True)))

    def __bool__(self) -> bool:
        return any(self._values())

    def _values(self) -> tuple[int, ...]:
        return self.trainable, self.frozen, self.buffers, self.bytes

    @property
    def parameters(self) -> int:
        return self.trainable + self.frozen

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Owned:
    """What one module holds itself, without its children.

    `counts` and `shapes` cover what no earlier module holds; `tied` names each tensor of an earlier
    module that stands here again: (local name, qualified name of the first place).
    """

    counts: Counts
    buffer_bytes: int
    shapes: tuple[tuple[int, ...], ...]
    tied: tuple[tuple[str, str], ...]
    uninitialized: bool


def owned_by_module(model: nn.Module) -> dict[str, Owned]:
    """For every module, by qualified name and in definition order, the tensors counted at it."""
    first_place: dict[object, str] = {}
    found: dict[str, Owned] = {}
    for prefix, module in model.named_modules():
        counts, held, shapes, tied, uninitialized = Counts(), 0, [], [], False
        for name, tensor, is_parameter in _own_tensors(module):
            if is_lazy(tensor):
                uninitialized = True
                continue
            qualified = f"{prefix}.{name}" if prefix else name
            earlier = first_place.setdefault(_identity(tensor), qualified)
            if earlier != qualified:
                tied.append((name, earlier))
                continue
            counts += _count(tensor, is_parameter)
            held += 0 if is_parameter else tensor.numel() * tensor.element_size()
            shapes.append(tuple(tensor.shape))
        found[prefix] = Owned(counts, held, tuple(shapes), tuple(tied), uninitialized)
    return found


def _recount(model: nn.Module) -> tuple[Counts, int]:
    """The counts of the whole model, and the bias elements of its convolutions and linear layers."""
    seen: set[object] = set()
    biases: dict[object, int] = {}
    trainable = frozen = buffers = size = 0
    for module in model.modules():
        for _, tensor, is_parameter in _own_tensors(module):
            if is_lazy(tensor) or (identity := _identity(tensor)) in seen:
                continue
            seen.add(identity)
            elements = tensor.numel()
            size += elements * tensor.element_size()
            if not is_parameter:
                buffers += elements
            elif tensor.requires_grad:
                trainable += elements
            else:
                frozen += elements
        if isinstance(module, _ConvNd | nn.Linear) and isinstance(module.bias, Tensor):
            biases[_identity(module.bias)] = module.bias.numel()
    return Counts(trainable, frozen, buffers, size), sum(biases.values())


def parameter_delta(before: nn.Module, after: nn.Module) -> dict[str, dict[str, int]]:
    """`before`, `after` and `delta` (after less before), recounted from the tensors.

    `delta` also has `conv_bias`: the change in bias elements of convolutions and linear layers, which
    is part of `trainable` (or `frozen`) as well.
    """
    return delta_of(_recount(before), _recount(after))


def delta_of(before: tuple[Counts, int], after: tuple[Counts, int]) -> dict[str, dict[str, int]]:
    """The same of what was counted elsewhere: both counts, each with its bias elements."""
    (old, old_biases), (new, new_biases) = before, after
    delta = {**(new - old).to_dict(), "conv_bias": new_biases - old_biases}
    return {"before": old.to_dict(), "after": new.to_dict(), "delta": delta}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    # Each alias of one tensor within a module is listed: the second is then reported as tied.
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, False


def _count(tensor: Tensor, is_parameter: bool) -> Counts:
    elements = tensor.numel()
    trainable = elements if is_parameter and tensor.requires_grad else 0
    frozen = elements if is_parameter and not tensor.requires_grad else 0
    return Counts(trainable, frozen, 0 if is_parameter else elements, elements * tensor.element_size())


def _identity(tensor: Tensor) -> object:
    """Equal for two tensors exactly when they are the same elements of the same memory.

    Offset and length count too: recurrent layers on a GPU keep all their weights in one storage.
    """
    if not tensor.numel():
        return id(tensor)
    try:
        storage: Any = tensor.untyped_storage()
        return storage._cdata, tensor.storage_offset(), tensor.numel()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return id(tensor)
