"""Numbers for the sizes that an exported program leaves open, in two sets that differ everywhere they can."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_NO_HINT = 4
"""The size of an axis whose size depends on the data."""


class Sizes:
    """A number for every open size of a program, from the first (0) or the second (1) set.

    The first set is what the program was exported on. The second is three times that, so that whatever
    divided a size still does; less where the program allows no more.
    """

    def __init__(self, program: torch.export.ExportedProgram, which: int) -> None:
        self._ranges = program.range_constraints
        self._which = which
        self._numbers: dict[Any, int] = {}
        self.open = False
        for node in program.graph.nodes:
            for value in _flat(node.meta.get("val")):
                for size in value.shape if isinstance(value, Tensor) else (value,):
                    if isinstance(size, torch.SymInt):
                        self._learn(size)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(int(self.number(size) or 0) for size in tensor.shape)

    def number(self, value: Any) -> int | float | bool | None:
        """The number that stands for `value`; None where it depends on what the data hold."""
        if isinstance(value, bool | int | float):
            return value
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return None
        expression = value.node.expr
        free: frozenset[Any] = getattr(expression, "free_symbols", frozenset())
        if not isinstance(value, torch.SymInt) and any(s not in self._numbers for s in free):
            return None
        result = expression.subs({symbol: self._numbers.get(symbol, _NO_HINT) for symbol in free})
        if isinstance(value, torch.SymBool):
            return bool(result)
        return int(result) if isinstance(value, torch.SymInt) else float(result)

    def depends_on_data(self, value: Any) -> bool:
        """Whether a size or number is known only once the program runs."""
        expression = getattr(getattr(value, "node", None), "expr", None)
        names = (str(symbol) for symbol in getattr(expression, "free_symbols", ()))
        return any(name.startswith(("u", "zuf")) for name in names)

    def _learn(self, size: torch.SymInt) -> None:
        for symbol in getattr(size.node.expr, "free_symbols", ()):
            if symbol in self._numbers:
                continue
            self.open = True
            hint = _hint_of(size, symbol)
            self._numbers[symbol] = hint if self._which == 0 else self._other(symbol, hint)

    def _other(self, symbol: Any, hint: int) -> int:
        allowed = self._ranges.get(symbol)
        for candidate in (3 * hint, 2 * hint, hint + 1, hint - 1):
            if candidate > 0 and (allowed is None or allowed.lower <= candidate <= allowed.upper):
                return candidate
        return hint


def _hint_of(size: torch.SymInt, symbol: Any) -> int:
    known = getattr(size.node.shape_env, "backed_var_to_val", None)
    if known is None:
        known = getattr(size.node.shape_env, "var_to_val", {})
    return int(known[symbol]) if symbol in known else _NO_HINT


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
