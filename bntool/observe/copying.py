"""A structural copy: new modules that share every parameter and buffer with the original.

It costs a few milliseconds and no tensor memory. A surgery starts from one, so that only the layers that
change get new tensors, and a run is made on one (`isolation`), so that nothing a forward leaves behind (lazy
state, cached tensors, hooks' counters) touches the user's model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import ObserveError
from bntool.observe.modules import is_batch_norm_class, modules_of, once_per_class

_EMPTY = frozenset({dict, set, list, OrderedDict})
_FLAT = frozenset({int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, type})
"""Types of what cannot change, and refers to nothing that can."""
_NO_TENSOR = _FLAT | _EMPTY | {tuple}
"""Types that are quickly told from a tensor, of which most attributes of a module are."""
_SHARDED = "fold the model before fully_shard, or load its full state_dict into one that is not sharded"
_MAX_NESTING = 8
"""Beyond this depth Python's own copying takes over: a list may hold itself."""


def is_plain(value: Any) -> bool:
    """Whether a value cannot change and holds nothing: a number, a word, an empty container."""
    kind = type(value)
    return kind in _FLAT or (kind in _EMPTY and not value)


def structural_copy(
    model: nn.Module,
    instead: Mapping[int, Tensor] | None = None,
    shared: list[tuple[str, Any]] | None = None,
) -> nn.Module:
    """A copy of the module tree whose parameters and buffers *are* the original's.

    Works where `copy.deepcopy` does not (weight-normalised layers hold tensors that autograd made).
    An attribute that Python cannot copy (a lock, an open file) is shared.

    Args:
        model: the original, which is not changed.
        instead: tensors that take the place of the original's, by the identity of these.
        shared: is given every attribute that had to be shared, and its name.

    Raises:
        ObserveError: a layer with a way of its own to be copied failed.
    """
    modules = list(modules_of(model))
    memo: dict[int, Any] = {id(m): object.__new__(type(m)) for m in modules if _copies_plainly(type(m))}
    memo.update(instead or {})
    deep: list[tuple[dict[str, Any], str]] = []
    for module in modules:
        if id(module) in memo:
            deep += _copy_state(module, memo[id(module)].__dict__, memo)
    reached = [model, *(child for m in modules if id(m) in memo for child in m._modules.values())]
    foreign = [module for module in reached if module is not None and id(module) not in memo]
    if deep or foreign:
        inside = [vars(m) for child in foreign for m in child.modules()]
        kept = [made for value in (*inside, *(s[k] for s, k in deep)) for made in _made_by_autograd(value)]
        # Python's own copying hands on what the memo holds
        for tensor in (*(tensor for m in modules for tensor in tensors_of(m)), *kept):
            memo.setdefault(id(tensor), tensor)
        for module in foreign:
            _copied_module(module, memo)
        for slots, key in deep:
            slots[key] = _deep_copy(slots[key], memo, key, shared)
    return _copied_module(model, memo)


@once_per_class
def _copies_plainly(cls: type) -> bool:
    """Whether the class leaves copying to Python, so that copying its `__dict__` copies it all."""
    custom = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__")
    kept = all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in custom)
    return kept and not issubclass(cls, torch.jit.ScriptModule)


def _copy_state(
    module: nn.Module, state: dict[str, Any], memo: dict[int, Any]
) -> list[tuple[dict[str, Any], str]]:
    """Fill `state` with what a copy of `module` holds; the slots that are left need a deep copy."""
    deep: list[tuple[dict[str, Any], str]] = []
    state.update(module.__dict__)
    for key, value in module.__dict__.items():
        kind = type(value)
        if kind in _FLAT or (kind is tuple and _FLAT.issuperset(map(type, value))):
            continue
        if kind in _EMPTY and not value:
            # remembered: the handle of a hook refers to the empty tables of its layer
            state[key] = memo.setdefault(id(value), kind())
        elif kind is list and _FLAT.issuperset(map(type, value)):
            state[key] = memo.setdefault(id(value), list(value))
        elif key in ("_parameters", "_buffers"):
            state[key] = {name: memo.get(id(tensor), tensor) for name, tensor in value.items()}
        elif key == "_modules":
            state[key] = children = dict(value)
            for name, child in value.items():
                if id(child) in memo:
                    children[name] = memo[id(child)]
                elif child is not None:
                    deep.append((children, name))
        elif key == "_compiled_call_impl":
            state[key] = None  # it is bound to the original, and would run that
        elif _holds_no_object(value):
            state[key] = copy.deepcopy(value, memo)
        elif isinstance(value, Tensor):
            state[key] = memo.get(id(value), value)
        else:
            deep.append((state, key))
    return deep


def _holds_no_object(value: Any, depth: int = 0) -> bool:
    """Whether a container nests nothing but numbers, words and containers, like a configuration."""
    kind = type(value)
    if kind is dict:
        value = (*value, *value.values())
    elif kind not in (list, tuple, set):
        return kind in _FLAT
    return depth < _MAX_NESTING and all(_holds_no_object(item, depth + 1) for item in value)


def _deep_copy(value: Any, memo: dict[int, Any], name: str, shared: list[tuple[str, Any]] | None) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001  any class may refuse, in its own way
        memo[id(value)] = value
        if shared is not None:
            shared.append((name, value))
        return value


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
            next_step=_SHARDED if "FSDP" in type(child).__name__ else "make copy.deepcopy(model) work",
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
    own = (module._parameters, module._buffers, module.__dict__)
    return [v for slots in own for v in slots.values() if type(v) not in _NO_TENSOR and isinstance(v, Tensor)]


def _made_by_autograd(value: Any, within: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Tensors in nested containers that Python refuses to copy: a training step kept them."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
        return
    if id(value) in within:
        return  # it holds itself
    if isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) not in _FLAT:
                yield from _made_by_autograd(item, (*within, id(value)))
