"""A structural copy: new modules that share every parameter and buffer with the original.

It costs a few milliseconds and no tensor memory. Observing runs on such a copy, so that nothing a
forward leaves behind (lazy state, cached tensors, hooks' counters) touches the user's model, and a
surgery starts from one, so that only the layers that change get new tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bntool.errors import ObserveError
from bntool.observe.modules import once_per_class

_EMPTY = (dict, set, list, OrderedDict)
_FLAT = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, type)


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers *are* the original's.

    Works where `copy.deepcopy` does not (weight-normalised layers hold tensors that autograd made).
    An attribute that Python cannot copy (a lock, an open file) is shared.

    Raises:
        ObserveError: a layer with a way of its own to be copied failed.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    plain = [m for m in modules if _copies_plainly(type(m))]
    for module in modules:
        for tensor in tensors_of(module):
            memo[id(tensor)] = tensor
        for value in module.__dict__.values():
            if isinstance(value, dict | list | tuple | set) and value:
                for tensor in _made_by_autograd(value):
                    memo[id(tensor)] = tensor
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in plain:
        memo[id(module)].__dict__.update(_copied_state(module, memo))
    return _copied_module(model, memo)


@once_per_class
def _copies_plainly(cls: type) -> bool:
    """Whether the class leaves copying to Python, so that copying its `__dict__` copies it all."""
    custom = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__")
    kept = all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in custom)
    return kept and not issubclass(cls, torch.jit.ScriptModule)


def _copied_state(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        if key == "_compiled_call_impl":
            state[key] = None  # it is bound to the original, and would run that
        elif key in ("_parameters", "_buffers"):
            state[key] = dict(value)
        elif key == "_modules":
            state[key] = {
                k: None if child is None else _copied_module(child, memo) for k, child in value.items()
            }
        elif isinstance(value, _FLAT) or (isinstance(value, tuple) and all(type(v) in _FLAT for v in value)):
            state[key] = value
        elif type(value) in _EMPTY and not value:
            state[key] = type(value)()
        else:
            try:
                state[key] = copy.deepcopy(value, memo)
            except Exception:  # noqa: BLE001  any class may refuse, in its own way
                state[key] = memo[id(value)] = value
    return state


def _copied_module(child: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(child) in memo:
        found: nn.Module = memo[id(child)]
        return found
    try:
        return copy.deepcopy(child, memo)
    except Exception as error:  # any class may fail, in its own way
        raise ObserveError(
            f"a layer cannot be copied: {error}",
            where=type(child).__name__,
            next_step="make copy.deepcopy(model) work",
        ) from error


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and plain attributes of one module that are tensors."""
    found: list[Tensor] = []
    for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
        if isinstance(value, Tensor):
            found.append(value)
    return found


def _made_by_autograd(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers that Python refuses to copy: a training step kept them."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict):
        yield from _made_by_autograd(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            if not isinstance(item, _FLAT):
                yield from _made_by_autograd(item)
