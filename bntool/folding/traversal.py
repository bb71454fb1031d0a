"""What a move through the graph collects, and in which order it visits ops."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op, Value
from bntool.laws import Refused


@dataclasses.dataclass(frozen=True)
class Take:
    """A linear layer takes a vector of channels in at its output or input side.

    Or the stored constant of an elementwise op, its `summand`, named by its handle, takes in a map of its own
    shape.
    """

    op: Op
    side: str
    vector: Affine
    handle: str = ""


@dataclasses.dataclass
class Way:
    """What one successful move collected: the layers that take in, and the laws passed on the way.

    `condition` is that of the maps whose inverse was needed.
    """

    takes: list[Take] = dataclasses.field(default_factory=list)
    laws: list[str] = dataclasses.field(default_factory=list)
    condition: float = 1.0


class Agenda:
    """Ops still to visit, by id, the first or the latest first. Ops join while others are taken."""

    def __init__(self, *, latest_first: bool = False) -> None:
        self._sign = -1 if latest_first else 1
        self._heap: list[int] = []
        self._waiting: set[int] = set()

    def add(self, op: int) -> None:
        if op not in self._waiting:
            self._waiting.add(op)
            heapq.heappush(self._heap, self._sign * op)

    def __iter__(self) -> Iterator[int]:
        while self._heap:
            op = self._sign * heapq.heappop(self._heap)
            self._waiting.remove(op)
            yield op


class Choices:
    """Which of several exact ways is taken at each place that has some: one combination after another."""

    def __init__(self) -> None:
        self._chosen: list[int] = []
        self._widths: list[int] = []

    def restart(self) -> None:
        self._widths = []

    def choose(self, options: int) -> int:
        position = len(self._widths)
        self._widths.append(options)
        if position == len(self._chosen):
            self._chosen.append(0)
        return self._chosen[position]

    def next(self) -> bool:
        """Take the next combination; false where there is none."""
        del self._chosen[len(self._widths) :]
        while self._chosen:
            if self._chosen[-1] + 1 < self._widths[len(self._chosen) - 1]:
                self._chosen[-1] += 1
                return True
            self._chosen.pop()
        return False


def require_fit(value: Value, affine: Affine) -> None:
    """A map must have the sizes of its value: those of a graph that is not run may be made up."""
    sizes = affine.scale.shape
    if len(sizes) != len(value.shape) or any(
        a not in (1, b) for a, b in zip(sizes, value.shape, strict=True)
    ):
        raise Refused(
            Reason.AXIS_MISMATCH, f"a map of shape {list(sizes)} meets a value of shape {list(value.shape)}"
        )
