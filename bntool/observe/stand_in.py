"""A stand-in for a model: what runs instead of it, so that nothing the run writes reaches it.

Modules, attributes, buffers and tensors in attributes are its own; parameters are shared unless asked else.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntool.observe.copying import structural_copy, tensors_of
from bntool.observe.modules import modules_of
from bntool.observe.side_effects import storage_of


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
    modules = list(modules_of(model))
    run = structural_copy(model, _own_tensors(modules, own_parameters), shared)
    if any(_SYNCS in vars(module) for module in modules):
        for module in modules_of(run):
            if _SYNCS in vars(module):  # DistributedDataParallel: other processes are not here, or not yet
                vars(module)[_SYNCS] = False
    return StandIn(run, tuple(shared))


_SYNCS = "require_forward_param_sync"
"""By which a wrapper writes the buffers of its first process into all of them before each forward."""


def own_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with the model, in its modes; where `copy.deepcopy` works, and beyond.

    Raises:
        ObserveError: a layer with a way of its own to be copied failed.
    """
    return structural_copy(model, _own_tensors(list(modules_of(model)), own_parameters=True))


def set_modes(model: nn.Module, *, training: bool) -> nn.Module:
    """The model with the flag of every layer set.

    No `train()` of the user's is called: an overridden one may merge weights, or return nothing. Frozen
    TorchScript has no flag.
    """
    set_each(modules_of(model), training=training)
    return model


def set_each(modules: Iterable[nn.Module], *, training: bool) -> None:
    """The flag of each of these modules set, and of none inside of them."""
    for module in modules:
        if getattr(module, "training", training) != training:  # to set an attribute of a module takes long
            module.training = training


def cast(model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
    """The model with its floating-point tensors in another type, or all of them on another device.

    By its own methods, of which some overridden ones return nothing; by torch's where an attribute hides one.
    """
    steps = [("double", ())] if dtype is torch.float64 else [("to", (dtype,))] if dtype is not None else []
    for name, given in [*steps, *([("to", (device,))] if device is not None else [])]:
        own = getattr(model, name, None)
        (own if callable(own) else functools.partial(getattr(nn.Module, name), model))(*given)
    return model


@torch.no_grad()
def _own_tensors(modules: Sequence[nn.Module], own_parameters: bool) -> dict[int, Tensor]:
    """A copy of each tensor by the identity of the original; views of one memory stay views of one."""
    found: dict[int, Tensor] = {}
    parameters: set[int] = set()
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue  # copied whole, by a way of its own
        parameters.update(map(id, module._parameters.values()))
        for tensor in tensors_of(module):
            found[id(tensor)] = tensor
    own: dict[int, Tensor] = {}
    memories: dict[int, list[Tensor]] = {}
    for key, tensor in found.items():
        if is_lazy(tensor):  # it gets its shape in place, and cannot be cloned
            lazy_class: Any = type(tensor)
            own[key] = lazy_class(device=tensor.device, dtype=tensor.dtype)
        else:
            memories.setdefault(storage_of(tensor) or key, []).append(tensor)
    for tensors in memories.values():
        if not own_parameters and any(id(tensor) in parameters for tensor in tensors):
            continue  # a view of a parameter goes with it
        memory = tensors[0].untyped_storage().clone() if len(tensors) > 1 else None
        for tensor in tensors:
            own[id(tensor)] = _own(tensor, memory)
    return own


def _own(tensor: Tensor, memory: torch.UntypedStorage | None) -> Tensor:
    """A copy of a tensor, in the copy of its memory where others share that."""
    made = _own_numbers(tensor, memory)
    if isinstance(tensor, nn.Parameter):
        if type(made) is Tensor:
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        made.requires_grad_()
    if attributes := vars(tensor):
        vars(made).update(attributes)
    return made


def _own_numbers(tensor: Tensor, memory: torch.UntypedStorage | None) -> Tensor:
    if type(tensor) not in _PLAIN:
        return copy.deepcopy(tensor)
    if memory is None or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return tensor.detach().clone()
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
