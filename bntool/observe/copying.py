"""A structural copy: new modules that share every parameter and buffer with the original.

It costs a few milliseconds and no tensor memory. Observing runs on such a copy, so that nothing a
forward leaves behind (lazy state, cached tensors, hooks' counters) touches the user's model, and a
surgery starts from one, so that only the layers that change get new tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_FLAT = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, type)


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers *are* the original's.

    Works where `copy.deepcopy` does not (weight-normalised layers hold tensors that autograd made).
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    plain = [m for m in modules if _is_plain(m)]
    for module in modules:
        for tensor in _own_tensors(module):
            memo[id(tensor)] = tensor
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        memo[id(module)].__dict__.update(_copied_state(module, memo))
    copied = memo.get(id(model))
    return copied if isinstance(copied, nn.Module) else copy.deepcopy(model, memo)


def _is_plain(module: nn.Module) -> bool:
    """Whether the class leaves copying to Python, so that copying its `__dict__` copies it all."""
    cls = type(module)
    custom = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__")
    return not any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in custom
    ) and not isinstance(module, torch.jit.ScriptModule)


def _copied_state(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        if key in ("_parameters", "_buffers"):
            state[key] = dict(value)
        elif key == "_modules":
            state[key] = {k: _copied_child(child, memo) for k, child in value.items()}
        elif isinstance(value, _FLAT) or (isinstance(value, tuple) and all(type(v) in _FLAT for v in value)):
            state[key] = value
        elif isinstance(value, dict | set) and not value:
            state[key] = value.copy()
        else:
            state[key] = copy.deepcopy(value, memo)
    return state


def _copied_child(child: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    return memo[id(child)] if id(child) in memo else copy.deepcopy(child, memo)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
        if isinstance(value, Tensor):
            found.append(value)
    return found
