"""How deep the objects in a pickle lie in each other.

torch's C++ unpickler frees what it made by calls within calls, and has no bound: deep ones end the process.
"""

from __future__ import annotations

import pickletools
from typing import NamedTuple

from bntool.files.security.archives import Damaged

DEEPEST = 500
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_FILLS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


class _Object(NamedTuple):
    depth: int
    kept: bool = False
    """Whether the memo has it: filled later, it would be deeper there than is counted."""


def is_nested_deeply(pickle: bytes) -> bool:
    """Whether objects lie more than `DEEPEST` deep in each other, or might. `Damaged` for no pickle."""
    stack: list[_Object | None] = []  # None is a mark
    memo: dict[int, _Object] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "MARK":
                stack.append(None)
            elif opcode.name in _PUT:
                top = _known(stack[-1])
                stack[-1] = memo[len(memo) if argument is None else int(argument)] = _Object(top.depth, True)
            elif opcode.name in _GET:
                stack.append(memo[int(str(argument))])
            else:
                parts = _taken(stack, opcode)
                if opcode.name in _FILLS and parts[0].kept:
                    return True
                depth = 1 + max((part.depth for part in parts), default=0)
                if depth > DEEPEST:
                    return True
                stack.extend(_Object(depth) for _ in opcode.stack_after)
    except (IndexError, KeyError, ValueError) as error:
        raise Damaged(str(error) or type(error).__name__) from error
    return False


def _known(item: _Object | None) -> _Object:
    if item is None:
        raise ValueError("a mark where an object belongs")
    return item


def _taken(stack: list[_Object | None], opcode: pickletools.OpcodeInfo) -> list[_Object]:
    """What an opcode takes off the stack, in the order in which it lay there."""
    single = len(opcode.stack_before)
    since_mark: list[_Object] = []
    if pickletools.markobject in opcode.stack_before:
        single = opcode.stack_before.index(pickletools.markobject)
        while (item := stack.pop()) is not None:
            since_mark.append(item)
    first = [_known(stack.pop()) for _ in range(single)]
    return [*reversed(first), *reversed(since_mark)]
