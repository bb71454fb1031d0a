"""A stand-in for a model: what runs instead of it, so that nothing the run writes reaches it.

Modules, attributes, buffers and tensors in attributes are its own; parameters are shared unless asked else.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.observe.copying import structural_copy, tensors_of
from bntool.observe.leftovers import storage_of


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A copy to be run; `shared` are attributes that Python could not copy, by name."""

    module: nn.Module
    shared: tuple[tuple[str, Any], ...] = ()


def stand_in(model: nn.Module, *, own_parameters: bool = False) -> StandIn:
    """A copy of `model`, in its modes, whose state is its own.

    Args:
        model: the original, which is not changed.
        own_parameters: whether the parameters are copied too. A buffer that is a view of a parameter goes
            with it.

    Raises:
        ObserveError: a layer with a way of its own to be copied failed.
    """
    shared: list[tuple[str, Any]] = []
    run = structural_copy(model, dict(_own_tensors(model, own_parameters)), shared)
    return StandIn(run, tuple(shared))


def own_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with the model, in its modes; where `copy.deepcopy` works, and beyond.

    Raises:
        ObserveError: a layer with a way of its own to be copied failed.
    """
    return structural_copy(model, dict(_own_tensors(model, own_parameters=True)))


def set_modes(model: nn.Module, *, training: bool) -> nn.Module:
    """The model with the flag of every layer set.

    No `train()` of the user's is called: an overridden one may merge weights, or return nothing.
    """
    for module in model.modules():
        module.training = training
    return model


def _own_tensors(model: nn.Module, own_parameters: bool) -> Iterator[tuple[int, Tensor]]:
    """A copy of each tensor by the identity of the original; views of one memory stay views of one."""
    parameters = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
    kept = set() if own_parameters else _storages(p for p in parameters.values() if not is_lazy(p))
    memories: dict[int, torch.UntypedStorage] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # copied whole, by a way of its own
        for tensor in tensors_of(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if is_lazy(tensor):  # it gets its shape in place, and cannot be cloned
                lazy_class: Any = type(tensor)
                yield id(tensor), lazy_class(device=tensor.device, dtype=tensor.dtype)
            elif own_parameters or not (id(tensor) in parameters or storage_of(tensor) in kept):
                yield id(tensor), _own(tensor, memories)


def _storages(tensors: Iterable[Tensor]) -> set[int | None]:
    return {storage_of(tensor) for tensor in tensors} - {None}


def _own(tensor: Tensor, memories: dict[int, torch.UntypedStorage]) -> Tensor:
    with torch.no_grad():
        made = _own_numbers(tensor, memories)
    if isinstance(tensor, nn.Parameter) and type(made) is Tensor:
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad != made.requires_grad and made.is_leaf:
        made.requires_grad_(tensor.requires_grad)
    for name, value in vars(tensor).items():
        setattr(made, name, value)
    return made


def _own_numbers(tensor: Tensor, memories: dict[int, torch.UntypedStorage]) -> Tensor:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    storage = storage_of(tensor) if plain and tensor.layout is torch.strided else None
    if storage is None or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.detach().clone() if plain else copy.deepcopy(tensor)
    if storage not in memories:
        memories[storage] = tensor.untyped_storage().clone()
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(memories[storage], tensor.storage_offset(), tensor.shape, tensor.stride())
