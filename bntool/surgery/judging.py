"""Are a fold's edits such that these tensors can take them? Judged before any is carried out.

A plan may come from anybody. What it names must be there, and each map must give as many numbers as the axis
that it scales has channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

from bntool.core.maps import Allowance, shape_of
from bntool.core.schema import Damaged
from bntool.core.sites import Edit

_RANKS = {"conv": range(2, 6), "transposed": range(2, 6), "linear": range(2, 3), "matmul": range(2, 3)}


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that is there."""

    shape: tuple[int, ...]
    is_floating_point: bool


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """What is found damaged inside has `place` before its own."""
    try:
        yield
    except Damaged as error:
        raise error.within(place) from None


class EditJudge:
    """Judges the edits of a plan by the tensors of one model, or file of weights, of so many `numbers`."""

    def __init__(self, held: Callable[[str], Held | None], numbers: int) -> None:
        self.held = held
        self.allowance = Allowance(numbers)
        self.seen: set[tuple[str, ...]] = set()

    def once(self, edit: Edit, bn: str) -> None:
        """`Damaged` where the plan has this edit already: it would be carried out twice."""
        key = (edit.kind, edit.layer, edit.weight, edit.bias, bn)
        if key in self.seen:
            raise Damaged("it stands here twice")
        self.seen.add(key)

    def change(self, edit: Edit) -> int:
        """Judge the edit of a weight, and tell how many outputs that has.

        Raises `Damaged`, with the place, where it cannot be carried out.
        """
        if edit.layout == "summand":
            return self._summand(edit)
        outputs, inputs = self._channels(edit)
        wanted = outputs if edit.kind == "scale_output" else inputs
        with at("map"):
            shape = shape_of(edit.map, self.leaf, self.allowance)
            if shape != (wanted,):
                raise Damaged(f"it gives numbers of shape {list(shape)} for {wanted} channels")
        if edit.bias:
            self._require_vector(edit.bias, outputs, "bias")
        return outputs

    def _summand(self, edit: Edit) -> int:
        """A constant that a sum adds: the map must be one of its own shape, or be spread to it."""
        held = self.tensor(edit.weight, "weight")
        if edit.bias or edit.kind != "scale_output" or not held.is_floating_point:
            raise Damaged(f"{edit.weight!r} is no constant that is added", "weight")
        with at("map"):
            shape = shape_of(edit.map, self.leaf, self.allowance)
            fits = len(shape) == len(held.shape)
            if not fits or any(n not in (1, size) for n, size in zip(shape, held.shape, strict=True)):
                raise Damaged(f"it gives numbers of shape {list(shape)} for {list(held.shape)}")
        self.allowance.spend(math.prod(held.shape))
        return math.prod(held.shape)

    def leaf(self, kind: str, name: str) -> tuple[int, ...]:
        """The shape of what a map reads: channels of a BatchNorm, or a tensor."""
        if kind == "tensor":
            return self.tensor(name).shape
        mean = self.tensor(f"{name}.running_mean".lstrip("."))
        if len(mean.shape) != 1 or not mean.is_floating_point:
            raise Damaged(f"{name!r} is no BatchNorm")
        self.tensor(f"{name}.running_var".lstrip("."))
        for slot in ("running_var", "weight", "bias"):
            self._require_vector(f"{name}.{slot}".lstrip("."), mean.shape[0])
        return mean.shape

    def tensor(self, handle: str, place: str = "") -> Held:
        """A tensor that must be there."""
        found = self.held(handle)
        if found is None:
            raise Damaged(f"there is no tensor {handle!r}", place)
        return found

    def _require_vector(self, handle: str, channels: int, place: str = "") -> None:
        found = self.held(handle)
        if found is not None and (found.shape != (channels,) or not found.is_floating_point):
            raise Damaged(
                f"{handle!r} is not one floating-point number for each of {channels} channels", place
            )

    def _channels(self, edit: Edit) -> tuple[int, int]:
        """How many outputs and inputs the weight has, by its layout."""
        if edit.layout == "norm":
            with at("layer"):
                (channels,) = self.leaf("bn", edit.layer)
            self._require_vector(edit.weight, channels, "weight")
            return channels, channels
        weight = self.tensor(edit.weight, "weight")
        shape, groups = weight.shape, edit.groups
        if not weight.is_floating_point:
            raise Damaged(f"{edit.weight!r} holds no floating-point numbers", "weight")
        if len(shape) not in _RANKS.get(edit.layout, ()):
            raise Damaged(f"{edit.weight!r} of shape {list(shape)} is no such weight", "layout")
        if groups != 1 and (edit.layout in ("linear", "matmul") or shape[0] % groups):
            raise Damaged(f"{edit.weight!r} of shape {list(shape)} has no {groups} groups", "groups")
        self.allowance.spend(math.prod(shape))
        if edit.layout == "matmul":
            return shape[1], shape[0]
        per_row, rows = shape[1] * groups, shape[0]
        return (per_row, rows) if edit.layout == "transposed" else (rows, per_row)
