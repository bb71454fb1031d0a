"""Which expressions are affine maps, and the shape that each computes; judged before any is computed.

No torch here. Each step of `affine` has one line in `_STEPS`: the types of its arguments, and the shape that
comes of them. An expression that passes computes without an error, within an `Allowance`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from bntool.core.schema import Axes, Damaged, Finite, Index, Name, Positive, Shape, Size, fitted

_MOST_DEPTH = 200
_CALL = 1024
"""A call of torch takes about as long as computing so many numbers."""
_PER_NUMBER = 16
_SMALL = 1 << 20

Leaf = Callable[[str, str], "tuple[int, ...]"]
"""The shape of a leaf: of `("bn", name)`, a vector of channels, or of `("tensor", handle)`."""
Indices = Annotated[tuple[Size, ...], msgspec.Meta(max_length=1 << 20)]


@dataclasses.dataclass
class Allowance:
    """How many numbers the edits of a plan may compute on a model that holds `numbers` of them.

    A map lies over the channels of a value that some weight of the model makes or reads; so none has more
    numbers than the model. A fold reads and writes each weight about once; sixteen times is let pass. A
    million numbers more, for the smallest models.
    """

    numbers: int
    left: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.left = _PER_NUMBER * (self.numbers + _SMALL)

    def spend(self, numbers: int, calls: int = 1) -> None:
        """Take the cost off; `Damaged` where too little is left, or one map outgrows the model."""
        self.left -= numbers + calls * _CALL
        if numbers > self.numbers + _SMALL or self.left < 0:
            raise Damaged(f"it computes more numbers than a model of {self.numbers:,} can need")


class _Tensor(msgspec.Struct, array_like=True, tag="tensor", forbid_unknown_fields=True):
    handle: Name
    shape: Shape

    def require(self, leaf: Leaf) -> None:
        if math.prod(leaf("tensor", self.handle)) != math.prod(self.shape):
            raise Damaged(f"{self.handle!r} has another shape")


class _Number(msgspec.Struct, array_like=True, tag="number", forbid_unknown_fields=True):
    values: tuple[Finite, ...]
    shape: Shape

    def require(self, _: Leaf) -> None:
        if len(self.values) != math.prod(self.shape):
            raise Damaged(f"{len(self.values)} numbers have another shape")


Constant = _Tensor | _Number


def nested_tuples(value: Any, depth: int = 0) -> Any:
    """An expression as JSON holds it, its lists made tuples."""
    if depth > _MOST_DEPTH:
        raise Damaged("it is nested too deeply")
    return tuple(nested_tuples(v, depth + 1) for v in value) if isinstance(value, list | tuple) else value


def shape_of(expr: Any, leaf: Leaf, allowance: Allowance) -> tuple[int, ...]:
    """The shape of the map that an expression computes; `Damaged` where it would not compute."""
    if not isinstance(expr, tuple) or not expr or not isinstance(expr[0], str):
        raise Damaged("a map begins with the name of a step")
    name, *rest = expr
    if name == "bn":
        shape = leaf("bn", _arguments(name, rest, tuple[Name])[0])
    elif name == "identity":
        shape = (1,) * _arguments(name, rest, tuple[Axes])[0]
    elif name in ("compose", "merge", "add", "together"):
        if len(rest) != 2:
            raise Damaged(f"{name} joins two maps")
        shape = _broadcast(*(shape_of(part, leaf, allowance) for part in rest))
    elif name == "concat":
        axis, sizes = _arguments(name, rest[:2], tuple[Index, Shape])
        shape = _joined([shape_of(part, leaf, allowance) for part in rest[2:]], axis, sizes)
    elif name in _STEPS and rest:
        kinds, rule = _STEPS[name]
        arguments = _arguments(name, rest[1:], kinds)
        before = shape_of(rest[0], leaf, allowance)
        for argument in arguments:
            if isinstance(argument, Constant):
                argument.require(leaf)
        shape = rule(before, *arguments)
    else:
        raise Damaged(f"there is no step {name[:80]!r}")
    indices = len(rest[-1]) if name in ("put", "take") else 0
    allowance.spend(math.prod(shape), calls=1 + indices)
    return shape


def _arguments(step: str, given: list[Any], kinds: Any) -> tuple[Any, ...]:
    try:
        found: tuple[Any, ...] = fitted(given, kinds)
    except Damaged as error:
        raise Damaged(f"{step}: {error.why}") from None
    return found


# -- the shape that each step gives ---------------------------------------------------------------------


def _axis(shape: tuple[int, ...], axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise Damaged(f"a map of {len(shape)} axes has no axis {axis}")
    return axis % len(shape)


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    axis = _axis(shape, axis)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise Damaged(why)


def _same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(first), len(second))
    pairs = zip((1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True)
    sizes = []
    for a, b in pairs:
        _require(a == b or 1 in (a, b), f"maps of {list(first)} and {list(second)} do not go together")
        sizes.append(b if a == 1 else a)
    return tuple(sizes)


def _with(shape: tuple[int, ...], constant: _Tensor | _Number, *_: Any) -> tuple[int, ...]:
    return _broadcast(shape, constant.shape)


def _placed(shape: tuple[int, ...], rank: int, axis: int) -> tuple[int, ...]:
    _require(len(shape) == 1, "a vector of channels is placed, nothing else")
    return _resized((1,) * rank, axis, shape[0])


def _reshaped(shape: tuple[int, ...], expanded: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    _require(_broadcast(shape, expanded) == expanded, f"{list(shape)} does not expand to {list(expanded)}")
    _require(math.prod(expanded) == math.prod(wanted), f"{list(expanded)} is not {list(wanted)} reshaped")
    return wanted


def _collapsed(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    _require(shape[_axis(shape, axis)] > 0, "an empty axis has no first entry")
    return _resized(shape, axis, 1)


def _permuted(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    _require(sorted(order) == list(range(len(shape))), f"{list(order)} is no order of {len(shape)} axes")
    return tuple(shape[axis] for axis in order)


def _sliced(
    shape: tuple[int, ...], axis: int, start: int | None, stop: int | None, step: int | None
) -> tuple[int, ...]:
    return _resized(shape, axis, len(range(*slice(start, stop, step).indices(shape[_axis(shape, axis)]))))


def _embedded(
    shape: tuple[int, ...], axis: int, size: int, start: int | None, stop: int | None, step: int | None
) -> tuple[int, ...]:
    part = shape[_axis(shape, axis)]
    _require(part in (1, len(range(*slice(start, stop, step).indices(size)))), "a part does not fit")
    return _resized(shape, axis, size)


def _taken(shape: tuple[int, ...], axis: int, indices: tuple[int, ...]) -> tuple[int, ...]:
    _require(max(indices, default=-1) < shape[_axis(shape, axis)], f"axis {axis} has no such entry")
    return _resized(shape, axis, len(indices))


def _put(shape: tuple[int, ...], axis: int, size: int, indices: tuple[int, ...]) -> tuple[int, ...]:
    _require(max(indices, default=-1) < size, f"axis {axis} has no such entry")
    _require(len(indices) == shape[_axis(shape, axis)], "each entry has one place")
    return _resized(shape, axis, size)


def _joined(parts: list[tuple[int, ...]], axis: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    _require(0 < len(parts) == len(sizes), "each part that is joined has a size")
    common: tuple[int, ...] = ()
    for part, size in zip(parts, sizes, strict=True):
        _require(len(part) == len(parts[0]), "parts of one rank are joined")
        _require(
            part[_axis(part, axis)] in (1, size), f"a part of {list(part)} is no {size} along axis {axis}"
        )
        common = _broadcast(common, _resized(part, axis, 1))
    return _resized(common, axis, sum(sizes))


_Sliced = tuple[Index, Index | None, Index | None, Positive | None]

_STEPS: dict[str, tuple[Any, Callable[..., tuple[int, ...]]]] = {
    "place": (tuple[Axes, Index], _placed),
    "scale_part": (tuple[()], _same),
    "shift_part": (tuple[()], _same),
    "unscaled_shift": (tuple[()], _same),
    "size": (tuple[()], _same),
    "square": (tuple[()], _same),
    "root": (tuple[()], _same),
    "inverse": (tuple[()], _same),
    "constant": (tuple[()], _same),
    "slope": (tuple[Constant], _with),
    "turn": (tuple[Constant], _with),
    "reshape": (tuple[Shape, Shape], _reshaped),
    "collapse": (tuple[Index], _collapsed),
    "permute": (tuple[Shape], _permuted),
    "slice": (_Sliced, _sliced),
    "embed": (tuple[Index, Size, Index | None, Index | None, Positive | None], _embedded),
    "take": (tuple[Index, Indices], _taken),
    "put": (tuple[Index, Size, Indices], _put),
    "fill": (tuple[()], _same),
    "divide_shift": (tuple[Constant], _with),
    "multiply_shift": (tuple[Constant], _with),
    "before_add": (tuple[Constant, Finite], _with),
    "after_add": (tuple[Constant, Finite], _with),
    "times": (tuple[Constant, Literal[1, -1]], _with),
    "plus": (tuple[Constant, Finite], _with),
}
