"""What a law is: how an affine map passes one kind of op, upstream and downstream.

`up` answers "the op's outputs must become these maps of themselves: what must its inputs become?";
`down` answers "its inputs have become these maps of what they were: what have its outputs become?".
A law that cannot keep the whole map exact raises `Refused`; nothing is ever approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Protocol

import torch

from bntool.core.reasons import Reason
from bntool.graph.affine import Affine, Constant, identity
from bntool.graph.dataflow import Graph, Op, Value
from bntool.graph.steps import first_asked


class Refused(Exception):
    """A map cannot move here; the reason becomes the verdict if no other way is found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Context(Protocol):
    """What a law may ask of the planner."""

    graph: Graph

    @property
    def changed(self) -> Set[str]:
        """The handles of constant operands that earlier folds have given other numbers."""

    def choose(self, options: int) -> int:
        """Pick one of several exact ways; the planner comes back with another where it fails."""

    def take_in(self, op: Op, role: str, affine: Affine) -> bool:
        """Let the stored constant that `op` reads as `role` become this map of itself, if that is tried."""

    @property
    def asks(self) -> bool:
        """Whether a value beside the one that changes may be asked to give way."""

    def ask(self, op: Op, role: str, affine: Affine) -> None:
        """Let the value that `op` reads as `role` become what this map makes into what it was."""


Maps = dict[str, Affine]
"""Maps by input role."""

Up = Callable[[Context, Op, "list[Affine]"], Maps]
Down = Callable[[Context, Op, Maps], "list[Affine]"]

LAWS: dict[str, tuple[Up, Down]] = {}
"""Kind of op -> (up, down)."""


def law(*kinds: str) -> Callable[[type], type]:
    """Register a class with static `up` and `down` for these kinds of op."""

    def register(cls: type) -> type:
        for kind in kinds:
            LAWS[kind] = (cls.up, cls.down)  # type: ignore[attr-defined]
        return cls

    return register


# -- what several laws need ---------------------------------------------------------------------------


def variable_roles(context: Context, op: Op) -> list[str]:
    """The roles of the inputs that depend on the model's input."""
    return [role for role in op.reads if not context.graph.input(op, role).constant]


def only_input(context: Context, op: Op) -> Value:
    """The op's data input; refused where another input depends on the data too."""
    for role in op.reads:
        if role != "input" and not context.graph.input(op, role).constant:
            raise Refused(Reason.UNKNOWN_OP, f"{op.label} has a second input that depends on the data")
    return context.graph.input(op)


def of_input(op: Op, maps: Maps) -> Affine:
    """The map of the op's data input; refused where another of its inputs would change."""
    for role in maps:
        if role != "input":
            raise Refused(Reason.NONLINEAR, f"{op.label} computes with its {role}, which would change")
    return maps["input"]


def along(affine: Affine, rank: int, what: str) -> Affine:
    """The map for a value of `rank`; refused where the ranks differ."""
    if affine.rank != rank:
        raise Refused(Reason.AXIS_MISMATCH, f"the map has {affine.rank} axes, {what} has {rank}")
    return affine


def constant_over(affine: Affine, axes: list[int], what: str) -> Affine:
    """The map with size 1 on `axes`; refused where it varies there."""
    for axis in axes:
        if affine.scale.shape[axis] == 1:
            continue
        for part in (affine.scale, affine.shift):
            if not bool(((part == first_asked(part, axis)) | torch.isnan(part)).all()):
                raise Refused(Reason.AXIS_MISMATCH, f"the map varies along axis {axis}, which {what} mixes")
        affine = affine.then("collapse", axis)
    return affine


def non_negative(affine: Affine, what: str) -> None:
    """Maximum and ReLU commute with a scale only where it is not negative."""
    scale = torch.nan_to_num(affine.scale, nan=1.0)
    if bool((scale < 0).any()):
        count = int((scale < 0).sum())
        raise Refused(Reason.NEGATIVE_SCALE, f"{count} of {scale.numel()} channels have γ < 0 at {what}")


def no_shift(affine: Affine, reason: Reason, what: str) -> None:
    if affine.has_shift:
        raise Refused(reason, what)


_MAX_CONSTANT = 1 << 16
"""A constant operand with more elements than this is no per-channel factor."""


def constant_operand(context: Context, op: Op, role: str) -> Constant:
    """The constant operand beside `role`, shaped for the op's output; refused where it is not known."""
    rank = len(context.graph.output(op).shape)
    number = op.attrs.get("number")
    if number is not None:
        return Constant.of(torch.tensor(number, dtype=torch.float64), "", rank)
    others = [r for r in op.reads if r != role]
    value = context.graph.input(op, others[0]) if len(others) == 1 else None
    if value is None or not value.constant:
        raise Refused(Reason.UNKNOWN_OP, f"the constant operand of {op.label} is not a known factor")
    stored = stored_behind(context.graph, value) or value
    tensor = context.graph.constant(stored)
    if tensor is None or tensor.is_complex() or tensor.numel() > _MAX_CONSTANT:
        raise Refused(Reason.UNKNOWN_OP, f"the constant operand of {op.label} is not a known factor")
    if stored.handle in context.changed:
        raise Refused(Reason.WEIGHT_SHARED, f"an earlier fold has changed the constant operand of {op.label}")
    return Constant.of(tensor.reshape(value.shape), stored.handle, rank)


def stored_behind(graph: Graph, value: Value) -> Value | None:
    """The stored tensor that this value shows, with other axes maybe; None where others read it."""
    while not value.handle:
        maker = graph.producer(value)
        if maker is None or maker.kind not in _RESHAPES or len(value.readers) != 1:
            return None
        value = graph.input(maker)
    tensor = graph.tensors.get(value.handle)
    shared = len(value.readers) != 1 or graph.aliases.get(value.handle)
    return None if tensor is None or not tensor.is_floating_point() or shared else value


_RESHAPES = frozenset({"reshape", "unsqueeze", "squeeze"})


def identities(context: Context, op: Op, given: Mapping[int, Affine]) -> list[Affine]:
    """One map per output, the identity where none was asked for."""
    return [
        given.get(i, identity(len(context.graph.values[value].shape))) for i, value in enumerate(op.outputs)
    ]
