"""Which step of a model makes two runs part: the first one that is fed alike and gives something else.

A step is a layer or a node. A value that differs is no fault where every reader of it agrees again: a fold
moves a factor from one layer to the next, and what lies between changes as it should.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bntool.core.text import as_lines


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer or node, in the order of execution, with the names of the values it reads and gives."""

    name: str
    kind: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Blame:
    """The place where candidate and reference first part, and what each has there.

    `index` is the worst element of `value`, `expected` and `got` are the two numbers that stand there;
    `relative` and `limit` are relative to the peak of the reference. `nodes` counts the nodes since the last
    values that agree: more than one where the reference tells nothing about those in between.
    """

    stage: str
    name: str
    kind: str
    value: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    expected: float
    got: float
    max_abs: float
    relative: float
    limit: float
    problem: str = ""
    nodes: int = 1

    def __str__(self) -> str:
        lines = [f"first differs at {self.name} ({self.kind}), {self.stage} stage"]
        shape = "x".join(map(str, self.shape)) or "scalar"
        lines.append(f"  value     {self.value}, {shape}")
        if self.index or not self.problem:
            at = list(self.index)
            lines.append(f"  worst     {at}: {self.got:.7g} where the reference has {self.expected:.7g}")
        if self.problem:
            lines.append(f"  problem   {self.problem}")
        else:
            lines.append(
                f"  max |d|   {self.max_abs:.2g}, relative {self.relative:.2g}, allowed {self.limit:.2g}"
            )
        if self.nodes > 1:
            lines.append(f"  within    the {self.nodes} nodes since the last values that agree")
        return as_lines(*lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite becomes None."""
        data = dataclasses.asdict(self) | {"shape": list(self.shape), "index": list(self.index)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def first_fault(
    steps: Sequence[Step], agrees: Mapping[str, bool], outputs: Sequence[str] = ()
) -> tuple[Step, str] | None:
    """The first step, and the value it gives, that differs although nothing it comes from does.

    `agrees` tells of each value that has a counterpart whether the two agree; a value without one is as good
    as what it was made from. `outputs` are what the model returns: a difference there is never undone.
    """
    maker = {value: step for step in steps for value in step.gives}
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for value in step.reads:
            readers.setdefault(value, []).append(step)
    tainted: dict[str, bool] = {}
    for step in steps:
        fed = any(tainted.get(value, not agrees.get(value, True)) for value in step.reads)
        for value in step.gives:
            tainted[value] = not agrees[value] if value in agrees else fed
    undone: dict[str, bool] = {}
    for step in reversed(steps):
        for value in step.gives:
            undone[value] = _undone(value, readers.get(value, []), agrees, undone, outputs)
    for step in steps:
        for value in step.gives:
            if agrees.get(value, True) or undone[value]:
                continue
            if not any(tainted.get(v, False) and not undone[v] for v in step.reads if v in maker):
                return step, value
    return None


def _undone(
    value: str,
    readers: Sequence[Step],
    agrees: Mapping[str, bool],
    undone: Mapping[str, bool],
    outputs: Sequence[str],
) -> bool:
    """Whether everything that reads a value agrees again, at once or further on."""
    if value in outputs or not readers:
        return False
    after = [given for reader in readers for given in reader.gives]
    return bool(after) and all(agrees.get(given, False) or undone.get(given, False) for given in after)
