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
from bntool.observe.modules import is_batch_norm_class, once_per_class

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


def is_separable(module: nn.Module) -> bool:
    """Whether a layer registered under several names is one that can take a fold in."""
    own = module._parameters or module._buffers
    return bool(own) and _is_plain(module) and not is_batch_norm_class(type(module))


def take_apart(root: nn.Module, layer: nn.Module) -> dict[int, nn.Module]:
    """Give every name of a layer under `root` a module of its own; they share tensors and children.

    Modules on the way that have several names are parted too. Where one cannot be, the name stays with the
    others. Changes the tree; returns for each copy, by identity, what it was made from.
    """
    names = [name for name, module in root.named_modules(remove_duplicate=False) if module is layer]
    copies: dict[int, nn.Module] = {}
    for name in names[1:]:
        copies.update(_parted(root, name))
    return copies


def _parted(root: nn.Module, name: str) -> dict[int, nn.Module]:
    holders: dict[int, int] = {}
    for holder in root.modules():
        for child in holder._modules.values():
            holders[id(child)] = holders.get(id(child), 0) + 1
    parts = name.split(".")
    way = [root.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    # the children of a copy are held by what it was made from as well
    start = next((i for i, module in enumerate(way) if holders[id(module)] > 1), len(way))
    if not all(map(_is_plain, way[start:])):
        return {}
    made: dict[int, nn.Module] = {}
    parent = way[start - 1] if start else root
    for part, module in zip(parts[start:], way[start:], strict=True):
        parent._modules[part] = parent = fresh = _shallow(module)
        made[id(fresh)] = module
    return made


def _is_plain(module: nn.Module) -> bool:
    return _copies_plainly(type(module)) and "forward" not in vars(module)


def _shallow(module: nn.Module) -> nn.Module:
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for slots in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[slots] = dict(module.__dict__[slots])
    copied.__dict__["_compiled_call_impl"] = None
    return copied


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
