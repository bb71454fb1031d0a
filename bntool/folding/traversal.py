"""What a move through the graph collects, and in which order it visits ops."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator

from bntool.graph.affine import Affine
from bntool.graph.dataflow import Op


@dataclasses.dataclass(frozen=True)
class Take:
    """A linear layer takes a vector of channels in at its output or input side.

    Or the constant that a sum adds, its `summand`, takes in a map of its own shape; `role` is what it is
    there.
    """

    op: Op
    side: str
    vector: Affine
    role: str = "weight"


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
