"""A law asked by hand: one op, what it reads, and what the planner would answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bntool.graph.affine import Affine
from bntool.graph.dataflow import Graph, Op

SHAPE = (2, 3, 4)


def affine(scale: Any, shift: Any = 0.0, shape: tuple[int, ...] = (1, -1, 1)) -> Affine:
    s = torch.tensor(scale, dtype=torch.float64).reshape(shape)
    t = torch.tensor(shift, dtype=torch.float64).expand(s.numel()).reshape(shape)
    return Affine(s, t, ("bn", "bn"))


class Seen:
    """A context over one op.

    `inputs` gives by role the numbers of a constant, else the shape of what depends on the data, None for
    `SHAPE`, which the outputs have too if nothing else is said. `picks` is chosen wherever there is a choice.
    """

    changed: frozenset[str] = frozenset()

    def __init__(
        self,
        attrs: dict[str, Any] | None = None,
        outputs: int | Sequence[tuple[int, ...]] = 1,
        kind: str = "mul",
        picks: int | None = None,
        **inputs: Tensor | tuple[int, ...] | None,
    ) -> None:
        self.graph, self.picks, self.taken = Graph(), picks, dict[str, Affine]()
        roles = {}
        for role, given in inputs.items():
            constant = isinstance(given, Tensor)
            shape = tuple(given.shape) if isinstance(given, Tensor) else given or SHAPE
            roles[role] = self.graph.add_value(shape, constant=constant).id
            if isinstance(given, Tensor) and given.numel():
                self.graph.constants[roles[role]] = given
        shapes = [SHAPE] * outputs if isinstance(outputs, int) else outputs
        made = tuple(self.graph.add_value(tuple(shape)).id for shape in shapes)
        self.op: Op = self.graph.add_op(kind, roles, made, attrs=attrs or {}, scope="here")

    def store(self, role: str) -> None:
        """Let what is read as `role` be a stored tensor of that name."""
        value = self.graph.input(self.op, role)
        value.handle = role
        self.graph.tensors[role] = self.graph.constants.pop(value.id)

    def choose(self, options: int) -> int:
        assert options > 1
        assert self.picks is not None
        return self.picks

    def take_in(self, op: Op, role: str, affine: Affine) -> bool:
        assert op is self.op
        self.taken[role] = affine
        return True
