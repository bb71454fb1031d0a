"""What a forward can reach outside its own model, put back after a run: globals, class attributes, what the
functions of its hooks close over, and attributes that Python cannot copy.

A copy of the model does not help there: a list in a global is the same list. What a value holds is noted
before the run, as far as Python shows it, and put back in place.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bntool.observe.modules import once_per_class

_MOST = 10_000
"""Values noted in one run: a data set's index in a global is too large to be looked through each time."""
_DEEPEST = 6
LARGEST_COPIED = 1 << 26
"""Bytes of an array that is copied in case somebody writes to it."""
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition)
_ATOMS = (int, float, complex, str, bytes, bool, type(None), range, torch.dtype, torch.device)
_CODE = (type, FunctionType, MethodType, ModuleType, CodeType, property, staticmethod, classmethod)
_SKIPPED = (*_ATOMS, *_CODE)

Restore = Callable[[], None]


class Surroundings:
    """The state of what a model's code can reach beyond the model, noted when made.

    Args:
        modules: those of the model, whose classes, hooks and functions are looked at.
        shared: attributes that a copy of the model shares with it, by name.
    """

    def __init__(self, modules: Sequence[nn.Module], shared: tuple[tuple[str, Any], ...] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.notes: list[str] = []
        self._undo: list[Restore] = []
        self._seen: set[int] = set()
        self._own = {id(module) for module in modules}
        for name, value in shared:
            self._note(value, 0)
            if not (_can_be_noted(value) or isinstance(value, _LOCKS)):
                kind = type(value).__name__
                self.notes.append(f"{name} (a {kind}) cannot be copied, so what a run does to it stays")
        for cls in {cls for kind in {type(module) for module in modules} for cls in _own_classes(kind)}:
            self._note_class(cls)
        for module in modules:
            for function in _functions_on(module):
                self._note_function(function)

    def restore(self) -> None:
        """Put everything back as it was."""
        for undo in reversed(self._undo):
            undo()

    # -- where state may lie --------------------------------------------------------------------------------

    def _note_class(self, cls: type) -> None:
        for name, value in vars(cls).items():
            if name.startswith("__") or isinstance(value, _CODE):
                continue
            with contextlib.suppress(AttributeError, TypeError):
                self._undo.append(functools.partial(_put_attribute, cls, name, value))
                self._note(value, 0)
        for function in _functions_of(cls):
            self._note_function(function)

    def _note_function(self, function: FunctionType, depth: int = 0) -> None:
        if id(function) in self._seen or depth > _DEEPEST or _is_foreign(function.__module__):
            return
        self._seen.add(id(function))
        read, written = _names_of(function.__code__)
        space = function.__globals__
        for name in read:
            value = space.get(name)
            if isinstance(value, FunctionType):
                self._note_function(value, depth + 1)
            elif not isinstance(value, _CODE):
                self._note(value, 0)
        for name in written:
            self._undo.append(functools.partial(_put_item, space, name, space.get(name, _ABSENT)))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                value = cell.cell_contents
                self._undo.append(functools.partial(_put_content, cell, value))
                if isinstance(value, FunctionType):
                    self._note_function(value, depth + 1)
                else:
                    self._note(value, 0)

    # -- what a value holds ---------------------------------------------------------------------------------

    def _note(self, value: Any, depth: int) -> None:
        if isinstance(value, _SKIPPED) or id(value) in self._seen or depth > _DEEPEST:
            return
        if len(self._seen) >= _MOST:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, nn.Module):
            self._note_module(value, depth)
        elif (undo := _undo_of(value)) is not None:
            self._undo.append(undo)
            for item in _items(value):
                self._note(item, depth + 1)
        elif isinstance(value, tuple):
            for item in value:
                self._note(item, depth + 1)
        elif isinstance(getattr(value, "__dict__", None), dict) and not _is_foreign(type(value).__module__):
            self._undo.append(_undo_dict(vars(value)))
            for item in list(vars(value).values()):
                self._note(item, depth + 1)

    def _note_module(self, module: nn.Module, depth: int) -> None:
        """A module that a closure or a global leads to: the model's own original, or one outside of it."""
        slots = vars(module)
        self._undo.append(_undo_dict(slots))
        for table in (slots.get(name) for name in ("_parameters", "_buffers", "_modules")):
            if isinstance(table, dict):
                self._undo.append(_undo_dict(table))
                for item in table.values():
                    self._note(item, depth if isinstance(item, nn.Module) else depth + 1)
        for item in list(slots.values()):
            self._note(item, depth + 1)


_ABSENT = object()


def _can_be_noted(value: Any) -> bool:
    return isinstance(value, nn.Module | Tensor) or _undo_of(value) is not None or hasattr(value, "__dict__")


def _undo_of(value: Any) -> Restore | None:
    """How to put back what a value of a known kind holds; None for other kinds, and for very large ones."""
    if isinstance(value, dict):
        return _undo_dict(value) if len(value) <= _MOST else None
    if isinstance(value, list | deque | set | bytearray):
        return _undo_container(value) if len(value) <= _MOST else None
    if isinstance(value, np.ndarray):
        return (
            functools.partial(_put_numbers, value, value.copy()) if value.nbytes <= LARGEST_COPIED else None
        )
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return functools.partial(_put_state, value, value.get_state())
    return None


def _undo_dict(value: dict[Any, Any]) -> Restore:
    """By the methods of its kind: a class of one's own may make something anew whenever it is asked."""
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    before = dict(kind.items(value))

    def undo() -> None:
        now = dict(kind.items(value))
        if list(now) != list(before) or any(now[key] is not before[key] for key in before):
            kind.clear(value)
            for key, item in before.items():
                kind.__setitem__(value, key, item)

    return undo


def _undo_container(value: Any) -> Restore:
    before = list(value)

    def undo() -> None:
        if len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True)):
            return
        value.clear()
        value.update(before) if isinstance(value, set) else value.extend(before)

    return undo


def _put_numbers(array: Any, before: Any) -> None:
    if array.flags.writeable and not np.array_equal(array, before):
        array[...] = before


def _put_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _put_attribute(cls: type, name: str, value: Any) -> None:
    if vars(cls).get(name, _ABSENT) is not value:
        setattr(cls, name, value)


def _put_item(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        space.pop(name, None)
    else:
        space[name] = value


def _put_content(cell: Any, value: Any) -> None:
    cell.cell_contents = value


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(dict.values(value))
    return list(value) if isinstance(value, list | deque | set) else []


# -- code ---------------------------------------------------------------------------------------------------


@functools.cache
def _names_of(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globals that a function's code reads, and those that it binds; code inside it included."""
    read: dict[str, None] = {}
    written: dict[str, None] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read[instruction.argval] = None
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            written[instruction.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more_read, more_written = _names_of(inner)
            read.update(dict.fromkeys(more_read))
            written.update(dict.fromkeys(more_written))
    return tuple(read), tuple(written)


@once_per_class
def _own_classes(cls: type) -> tuple[type, ...]:
    """The class and its bases, as far as they are not PyTorch's or Python's own."""
    return tuple(base for base in cls.__mro__ if not _is_foreign(base.__module__))


def _is_foreign(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in ("torch", "builtins", "typing", "abc", "collections", "numpy", "bntool")


@once_per_class
def _functions_of(cls: type) -> tuple[FunctionType, ...]:
    found = (_plain(value) for value in vars(cls).values())
    return tuple(function for function in found if function is not None)


def _plain(value: Any) -> FunctionType | None:
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.partial):
        value = value.func
    return value if isinstance(value, FunctionType) else None


def _functions_on(module: nn.Module) -> Iterator[FunctionType]:
    """Functions that one instance holds: its hooks, a forward of its own, a lambda in an attribute."""
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind in _CALLABLE:
            candidates: Any = (value,)
        elif isinstance(value, dict) and value and name.endswith("_hooks"):
            candidates = value.values()
        else:
            continue
        for candidate in candidates:
            if (function := _plain(candidate)) is not None:
                yield function


_PLAIN = frozenset({int, float, str, bool, type(None), tuple, list, set})
"""Types of most attributes, which are no functions and hold no hooks."""
_CALLABLE = frozenset({FunctionType, MethodType, functools.partial})
