"""What a module computes of its own tensors, call by call, as an affine map that names them.

Each op of one call is read: what rests on stored tensors alone is a constant, whatever these are called, and
what the data become is a map s·x + t. So the map is told by the arithmetic, and a plan that holds it fits
other weights of the same model. A constant that is made in a way not known here counts as its numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from bntool.graph.affine import Affine, Constant, compose, identity, together
from bntool.graph.dataflow import Graph, Op, Value
from bntool.graph.ops import permuted_axes

_SAME = frozenset({"identity", "dropout"})
_MOVES = frozenset("reshape flatten squeeze unsqueeze expand".split())
_READ = _SAME | _MOVES | set("permute batch_norm addcmul add sub rsub mul div".split())
"""Kinds of ops that can end what a module does to its input."""
_POWERS: dict[float, tuple[str, ...]] = {
    1.0: (),
    0.5: ("root",),
    -0.5: ("root", "inverse"),
    -1.0: ("inverse",),
    2.0: ("square",),
}
_OWN_POWER = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}
_MOST_NUMBERS = 1 << 16
"""A constant with more numbers is nothing per channel."""


@dataclasses.dataclass(frozen=True)
class OwnMap:
    """The map over the vector of channels, which lie along `axis`; the values of the stored tensors in it."""

    affine: Affine
    axis: int
    stored: tuple[int, ...]


class Unread(Exception):
    """The ops are no affine map with a factor and a summand for each channel."""


def own_map(graph: Graph, ops: list[Op], given: int, made: int) -> OwnMap | None:
    """What `ops` make of the value `given`, where that is one BatchNorm's map and all that leads to `made`.

    None where it is not, or where a factor or a summand for each channel is missing: a layer scale, a bias.
    """
    last, source, result = graph.producer(graph.values[made]), graph.values[given], graph.values[made]
    if last is None or last.kind not in _READ or (result.shape, result.dtype) != (source.shape, source.dtype):
        return None  # as most modules of a network: no need to read them through
    try:
        return _Reader(graph, given).read(ops, made)
    except (Unread, KeyError):
        return None


class _Reader:
    def __init__(self, graph: Graph, given: int) -> None:
        self.graph, self.source = graph, graph.values[given]
        self.maps: dict[int, Affine] = {given: identity(len(self.source.shape))}
        self.constants: dict[int, Affine] = {}
        self.stored: dict[int, None] = {}
        self.is_new = self.has_factor = self.has_summand = False

    def read(self, ops: list[Op], made: int) -> OwnMap | None:
        for op in ops:
            if all(self.graph.values[value].constant for value in op.outputs):
                continue  # read where something needs it
            try:
                self._data(op)
            except (Unread, KeyError):
                if op.inplace:
                    raise
                # only its size may be asked for
        found = self.maps[made]
        if not (self.has_factor and self.has_summand):
            return None
        parts = [[i for i, size in enumerate(part.shape) if size != 1] for part in (found.scale, found.shift)]
        if parts[0] != parts[1] or len(parts[0]) != 1 or not self.stored:
            return None
        (axis,) = parts[0]
        channels = self.source.shape[axis]
        vector = found.then("reshape", tuple(found.scale.shape), (channels,))
        return OwnMap(vector, axis, tuple(self.stored)) if axis > 0 else None

    # -- data -------------------------------------------------------------------------------------------

    def _data(self, op: Op) -> None:
        roles = [role for role in op.reads if op.inputs[role] in self.maps]
        if len(roles) != 1 or (op.inplace and not self.is_new):
            raise Unread
        (role,) = roles
        data, others = self.maps[op.inputs[role]], [r for r in op.reads if r != role]
        if op.kind in _SAME:
            after = data
        elif op.kind == "permute" or op.kind in _MOVES:
            after = self._moved(op, data)
        elif op.kind == "batch_norm":
            after = self._normed(op, data)
        elif op.kind == "addcmul" and role != "input":
            other = next(r for r in others if r != "input")
            factor, summand = self._beside(op, other), self._beside(op, "input")
            self.has_factor |= factor.scale.numel() > 1
            self.has_summand |= summand.scale.numel() > 1
            scaled = compose(_times(op.attrs["alpha"]), compose(factor, data))
            after = together(scaled, summand.then("constant"))
        else:
            after = self._arithmetic(op, data, role, others)
        self.is_new |= not op.views
        self.maps[op.outputs[0]] = after

    def _arithmetic(self, op: Op, data: Affine, role: str, others: list[str]) -> Affine:
        if op.kind not in ("add", "sub", "rsub", "mul", "div") or len(others) > 1:
            raise Unread
        operand = self._beside(op, others[0]) if others else _times(op.attrs["number"])
        first = role == "input"
        if op.kind == "rsub":
            first = not first
        alpha = op.attrs["alpha"]
        if op.kind in ("mul", "div"):
            if op.kind == "div" and not first:
                raise Unread
            self.has_factor |= operand.scale.numel() > 1
            return compose(operand if op.kind == "mul" else operand.then("inverse"), data)
        self.has_summand |= operand.scale.numel() > 1
        return _summed(op.kind, data, operand.then("constant"), alpha, first)

    def _moved(self, op: Op, data: Affine) -> Affine:
        before, after = self._shape(op.inputs["input"]), self._shape(op.outputs[0])
        if op.kind == "permute":
            return data.then("permute", permuted_axes(op.attrs, len(before)))
        axes = [i for i, size in enumerate(data.scale.shape) if size != 1]
        axes += [i for i, size in enumerate(data.shift.shape) if size != 1 and i not in axes]
        if op.kind == "expand" or math.prod(before) != math.prod(after) or len(axes) > 1:
            raise Unread
        wanted = [1] * len(after)
        if axes:
            behind = math.prod(before[axes[0] :])
            place = next((i for i in range(len(after)) if math.prod(after[i:]) == behind), None)
            if place is None or after[place] != before[axes[0]]:
                raise Unread
            wanted[place] = after[place]
        both = tuple(torch.broadcast_shapes(data.scale.shape, data.shift.shape))
        return data.then("reshape", both, tuple(wanted))

    def _normed(self, op: Op, data: Affine) -> Affine:
        """γ·(x − μ)/√(σ²+ε) + β, whatever the four are made of."""
        if op.attrs["training"] or not {"running_mean", "running_var"} <= op.inputs.keys():
            raise Unread
        self.has_factor = self.has_summand = True
        placed = [1] * data.rank
        placed[op.attrs["axis"]] = self._shape(op.inputs["input"])[op.attrs["axis"]]

        def vector(role: str) -> Affine:
            known = self._constant(op.inputs[role])
            return known.then("reshape", tuple(known.scale.shape), tuple(placed))

        spread = together(vector("running_var"), _times(op.attrs["eps"])).then("root").then("inverse")
        after = _summed("sub", data, vector("running_mean").then("constant"), 1.0, True)
        after = compose(spread, after)
        if "weight" in op.inputs:
            after = compose(vector("weight"), after)
        return together(after, vector("bias").then("constant")) if "bias" in op.inputs else after

    # -- constants: their numbers are the scale of a map that shifts nothing ----------------------------

    def _beside(self, op: Op, role: str) -> Affine:
        return self._constant(op.inputs[role])

    def _constant(self, number: int) -> Affine:
        if number not in self.constants:
            self.constants[number] = self._read_constant(self.graph.values[number])
        return self.constants[number]

    def _read_constant(self, value: Value) -> Affine:
        if value.handle:
            return self._leaf(value)
        op = self.graph.producer(value)
        if op is not None and len(op.outputs) == 1 and not op.inplace:
            try:
                return self._computed(op)
            except (Unread, KeyError, TypeError):
                pass
        return self._leaf(value)

    def _leaf(self, value: Value) -> Affine:
        tensor = self.graph.constant(value)
        if not value.constant or tensor is None or tensor.is_complex() or tensor.numel() > _MOST_NUMBERS:
            raise Unread
        if value.handle:
            self.stored[value.id] = None
        rank = max(tensor.dim(), 1)
        return identity(rank).then_constant("times", Constant.of(tensor, value.handle, rank), 1)

    def _computed(self, op: Op) -> Affine:
        if op.kind in _SAME:
            return self._constant(op.inputs["input"])
        if op.kind in _OWN_POWER or op.kind == "pow":
            power = _OWN_POWER[op.kind] if op.kind in _OWN_POWER else float(op.attrs["number"])
            found = self._constant(op.inputs["input"])
            if bool((found.scale < 0).any()):
                raise Unread
            for step in _POWERS[power]:
                found = found.then(step)
            return found
        if op.kind == "permute":
            found = self._constant(op.inputs["input"])
            return found.then("permute", permuted_axes(op.attrs, found.rank))
        if op.kind in _MOVES or op.kind == "select":
            return self._placed(op, self._constant(op.inputs["input"]))
        if op.kind not in ("add", "sub", "mul", "div") or not op.reads:
            raise Unread
        first = self._constant(op.inputs["input"]) if "input" in op.inputs else _times(op.attrs["number"])
        second = self._constant(op.inputs["other"]) if "other" in op.inputs else _times(op.attrs["number"])
        if op.kind in ("mul", "div"):
            return compose(first, second if op.kind == "mul" else second.then("inverse"))
        return _summed(op.kind, first, second, op.attrs["alpha"], True)

    def _placed(self, op: Op, found: Affine) -> Affine:
        """The same numbers in another shape, or one entry along an axis."""
        before, after = self._shape(op.inputs["input"]) or (1,), self._shape(op.outputs[0]) or (1,)
        if op.kind == "expand":
            own = tuple(found.scale.shape)
            return found.then("reshape", own, (1,) * (len(after) - len(own)) + own)
        if op.kind == "select":
            axis = op.attrs["axis"] % len(before)
            place = op.attrs["index"] % before[axis] if found.scale.shape[axis] > 1 else 0
            found = found.then("slice", axis, place, place + 1, 1)
            before = (*before[:axis], 1, *before[axis + 1 :])
        return found.then("reshape", before, after)

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape


def _times(number: Any) -> Affine:
    if number is None:
        raise Unread
    return identity(1).then_constant(
        "times", Constant.of(torch.tensor([float(number)], dtype=torch.float64), "", 1), 1
    )


def _summed(kind: str, first: Affine, second: Affine, alpha: Any, in_order: bool) -> Affine:
    """First + α·second or first − α·second; with the other sign and order where not `in_order`."""
    if alpha is None or (not in_order and alpha != 1.0):
        raise Unread
    weighed = float(alpha) if kind == "add" else -float(alpha)
    if in_order:
        return together(first, second if weighed == 1 else compose(_times(weighed), second))
    return together(first if weighed == 1 else compose(_times(weighed), first), second)
