"""A look at what a file built, before anything in it is called: no method hidden, no hook, no odd child."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bntool.files.security.missing import Opaque
from bntool.files.security.pickled_calls import shown
from bntool.files.security.rules import home_of, may_be_called
from bntool.layers import has_foreign_hook

_CODE = (type, types.FunctionType, types.BuiltinFunctionType)
# The members of an enum are the process's own: a file only looks them up.
_LEAVES = (str, bytes, bytearray, int, float, complex, enum.Enum, *_CODE)
_REGISTRIES = {"_parameters": nn.Parameter, "_buffers": Tensor, "_modules": nn.Module}


def complaints(loaded: Any) -> Iterator[str]:
    """What is wrong with a loaded object, one line each; nothing for what an honest file builds.

    A file can set any attribute of the objects it makes. One that hides a method, or a hook, would be
    called by the first forward. Every object is visited once, however often it is shared.
    """
    seen: dict[int, Any] = {}
    waiting: list[Any] = [loaded]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _CODE) and not _is_harmless(value):
            yield f"keeps {shown(home_of(value))} itself, which a layer could call"
        if value is None or isinstance(value, _LEAVES) or id(value) in seen:
            continue
        # Kept alive, so that no id is given out twice.
        seen[id(value)] = value
        attributes = _attributes(value)
        yield from _hidden_methods(value, attributes)
        if isinstance(value, nn.Module):
            yield from _module(value, attributes)
        elif isinstance(value, Tensor):
            yield from _tensor(value)
        waiting.extend(attributes.values())
        waiting.extend(_items(value))
    yield from _circles([value for value in seen.values() if isinstance(value, nn.Module)])


def _is_harmless(code: Any) -> bool:
    """A function or class that may be called with whatever the file holds; a stand-in does nothing."""
    return may_be_called(code) or (isinstance(code, type) and issubclass(code, Opaque))


def _attributes(value: Any) -> Mapping[Any, Any]:
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return ()


_WORDS = frozenset({"type"})
"""Methods of a layer that nobody calls, whose names detectors give to words of theirs."""


def _hidden_methods(value: Any, attributes: Mapping[Any, Any]) -> Iterator[str]:
    for name, attribute in attributes.items():
        if not isinstance(name, str):
            yield f"gives a {type(value).__name__} an attribute that has no name"
            continue
        inherited = getattr(type(value), name, None)
        if name in _WORDS and type(attribute) is str and isinstance(value, nn.Module):
            continue
        if callable(inherited) and not isinstance(inherited, type) and attribute is not None:
            yield f"hides the method {type(value).__name__}.{shown(name)}"


def _module(module: nn.Module, attributes: Mapping[Any, Any]) -> Iterator[str]:
    kind = type(module).__name__
    for name, attribute in attributes.items():
        if str(name).endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and has_foreign_hook(
            attribute
        ):
            yield f"brings hooks for a {kind} ({shown(name)})"
    # Called in place of forward when it is set.
    if attributes.get("_compiled_call_impl") is not None:
        yield f"brings a compiled call for a {kind}"
    if "training" not in attributes:
        yield f"leaves a {kind} without its mode"
    for registry, member in _REGISTRIES.items():
        children = attributes.get(registry)
        if not isinstance(children, dict):
            yield f"leaves a {kind} without its {registry}"
            continue
        if any(c is not None and not isinstance(c, member) for c in dict.values(children)):
            yield f"puts something else among the {registry} of a {kind}"
        for name in dict.keys(children):
            # Exporters put the names of layers between quotes, in source code.
            if not isinstance(name, str) or not name.isprintable() or any(c in "\"'`\\" for c in name):
                yield f"names one of the {registry} of a {kind} by what is no name: {shown(str(name))}"


def _circles(modules: list[nn.Module]) -> Iterator[str]:
    """A layer inside itself: whoever walks the tree of layers would never come back."""
    inside = {id(m): [id(c) for c in _children(m) if isinstance(c, nn.Module)] for m in modules}
    holders = collections.Counter(child for children in inside.values() for child in children)
    free = [module for module in inside if not holders[module]]
    for module in free:  # grows: a layer whose holders have all been taken away is free itself
        for child in inside[module]:
            holders[child] -= 1
            if not holders[child]:
                free.append(child)
    if len(free) < len(inside):
        yield "puts a layer inside itself"


def _children(module: nn.Module) -> Iterable[Any]:
    children = _attributes(module).get("_modules")
    return dict.values(children) if isinstance(children, dict) else ()


def _tensor(tensor: Tensor) -> Iterator[str]:
    if type(tensor) not in (Tensor, nn.Parameter):
        yield f"holds a tensor of the class {type(tensor).__name__}"
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        yield "brings hooks for a tensor"
