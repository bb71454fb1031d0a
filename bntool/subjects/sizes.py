"""Inputs like an example of other sizes: small ones for what is proved there, and longer ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bntool.graph.dataflow import Graph
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs

_LEAST = 8
"""No side is made shorter: where every map has but a few places, too much comes out alike by chance."""
_WORTH = 0.6
"""A smaller input of more than this share of the example's numbers saves too little to be looked for."""

ShapeOf = Callable[[Tensor], list[int]]


def smaller(inputs: Inputs, graph: Graph) -> Iterator[Inputs]:
    """Smaller inputs that the model of this graph may take the same path on, the smallest first; then inputs
    of the example's own sides. All have one sample more, and seeded values.

    The sides are so long that the shortest map that any convolution makes has two places, then more: odd ones
    of which no two are alike, then such as a stride may divide. Of a sequence (N, L, F) the other axis is
    tried too.
    """
    shapes = list(_shrunken(inputs, graph))

    def odd(shape_of: ShapeOf) -> ShapeOf:
        return lambda tensor: _odd(shape_of(tensor))

    seen: set[str] = set()
    for seed, shape_of in enumerate([*map(odd, shapes), *shapes, _whole]):
        asked = str([shape_of(tensor) for tensor in inputs.tensors().values()])
        if asked not in seen:
            seen.add(asked)
            yield drawn(inputs, shape_of, seed, more=1)


def _whole(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def is_telling(small: Inputs, example: Inputs) -> bool:
    """Whether no side of an input is one of the example's, or even, or that of another axis."""
    pairs = zip(small.tensors().values(), example.tensors().values(), strict=True)
    sides = [(list(a.shape[2:]), list(b.shape[2:])) for a, b in pairs if a.dim() > 2]
    return bool(sides) and all(
        len(set(a)) == len(a) and all(x % 2 and x != y for x, y in zip(a, b, strict=True)) for a, b in sides
    )


def _shrunken(inputs: Inputs, graph: Graph) -> Iterator[ShapeOf]:
    tensors = inputs.tensors().values()
    shortest = _shortest_maps(graph)
    shapes: list[ShapeOf] = [
        functools.partial(_shrunk, places=places, shortest=shortest) for places in (1.25, 2, 3, 4)
    ]
    if any(tensor.dim() == 3 for tensor in tensors):
        shapes.append(_shrunken_sequence)
    whole = sum(tensor.numel() for tensor in tensors)
    for shape_of in shapes:
        if sum(math.prod(shape_of(tensor)) for tensor in tensors) <= _WORTH * whole:
            yield shape_of


def _shortest_maps(graph: Graph) -> list[int]:
    """By axis from the last: the fewest places, but more than one, that any convolution has along it."""
    found: list[int] = []
    for op in graph.of_kind("conv"):
        for axis, side in enumerate(reversed(graph.output(op).shape[2:])):
            found += [0] * (axis + 1 - len(found))
            if side > 1:
                found[axis] = min(found[axis] or side, side)
    return found


def _shrunk(tensor: Tensor, places: float, shortest: Sequence[int]) -> list[int]:
    first, sides = list(tensor.shape[:2]), list(tensor.shape[2:])
    for axis, side in enumerate(sides):
        at = len(sides) - axis - 1
        fewest = shortest[at] if at < len(shortest) and shortest[at] else side
        sides[axis] = min(side, max(math.ceil(side * places / fewest), _LEAST))
    return [*first, *sides]


def _shrunken_sequence(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    if len(shape) == 3:
        shape[1] = min(shape[1], max(shape[1] // 4, _LEAST))
    return shape


def besides(small: Inputs) -> Iterator[Inputs]:
    """Inputs beside a small one, of other sides and one sample less, the most telling first.

    Odd sides, of which the last is longer; the last longer by 32, since many models take only such; other
    sides of the same area, for what a linear layer of a fixed width reads; a sequence (N, L, F) longer
    along L.
    """
    shapes: list[ShapeOf] = [
        lambda tensor: _odd(tensor.shape),
        functools.partial(_longer_last, more=32),
        _of_same_area,
        _longer_sequence,
    ]
    for seed, shape_of in enumerate(shapes, start=10):
        if any(shape_of(tensor) != list(tensor.shape) for tensor in small.tensors().values()):
            yield drawn(small, shape_of, seed, more=-1)


def _odd(shape: Sequence[int]) -> list[int]:
    """Odd sides, each longer than the one before by another number."""
    sides = [side + 1 + side % 2 for side in shape[2:]]
    return [*shape[:2], *(side + 8 * axis for axis, side in enumerate(sides))]


def _longer_last(tensor: Tensor, more: int) -> list[int]:
    last = tensor.dim() - 1
    return [n + more if axis == last > 1 else n for axis, n in _sides(tensor)]


def longer(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs longer than these along every axis, for what a model does by size.

    By 33, so that even sides become odd (the depth of a volume or clip by one, for 3-d convolutions are
    dear); by 32, since many models take only such; a sequence (N, L, F) longer along L.
    """
    shapes: list[ShapeOf] = [functools.partial(_longer, more=33), functools.partial(_longer, more=32)]
    if any(tensor.dim() == 3 for tensor in inputs.tensors().values()):
        shapes.append(_longer_sequence)
    for seed, shape_of in enumerate(shapes, start=20):
        yield drawn(inputs, shape_of, seed, more=0)


def other_sizes(inputs: Inputs, *, fixed: bool = False) -> Iterator[Inputs]:
    """Inputs like these of other sizes, the most telling first: seeded values, one sample more.

    Longer by 33, so that even sides become odd (the depth of a volume or clip by one, for 3-d convolutions
    are dear); by 32, since many models take only such; a sequence (N, L, F) longer along L; other sides of
    the same area, for what a linear layer of a fixed width reads; then the old sides. The values spread more
    widely, so that a number read from them is another one. Only the number of samples changes for a model of
    `fixed` sides.
    """
    shapes: list[ShapeOf] = []
    if not fixed:
        shapes += [functools.partial(_longer, more=33), functools.partial(_longer, more=32)]
        if any(tensor.dim() == 3 for tensor in inputs.tensors().values()):
            shapes.append(_longer_sequence)
        if any(_of_same_area(tensor) != list(tensor.shape) for tensor in inputs.tensors().values()):
            shapes.append(_of_same_area)
    for seed, shape_of in enumerate((*shapes, _whole)):
        yield drawn(inputs, shape_of, seed, more=1)


def fewer(inputs: Inputs, graph: Graph) -> Iterator[Inputs]:
    """One sample, of half the sides where no map then shrinks to one place; one of the example's."""
    shortest = _shortest_maps(graph)

    def halves(tensor: Tensor) -> list[int]:
        least = _shrunk(tensor, 2, shortest)[2:]
        sides = zip(tensor.shape[2:], least, strict=True)
        return [*tensor.shape[:2], *(max(side // 2, low) for side, low in sides)]

    shapes: tuple[ShapeOf, ...] = (halves, _whole)
    for seed, shape_of in enumerate(shapes, start=30):
        one = drawn(inputs, shape_of, seed, more=0)
        yield one.map(lambda tensor: tensor[:1] if tensor.dim() > 1 else tensor)


def other_values(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs of these sizes that a branch on numbers may take another way: bytes from 0 to 255 as images hold
    them, the same below zero, values about zero a hundred times smaller, nothing but zeros.
    """
    for low, high in ((0.0, 255.0), (-255.0, 0.0), (-0.01, 0.01), (0.0, 0.0)):
        yield inputs.map(functools.partial(_spread, low=low, high=high))


def _spread(tensor: Tensor, low: float, high: float) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    least, most = tensor.aminmax() if tensor.numel() else (tensor.new_zeros(()),) * 2
    share = (tensor - least) / (most - least).clamp(min=torch.finfo(tensor.dtype).tiny)
    return share * (high - low) + low


def drawn(inputs: Inputs, shape_of: ShapeOf, seed: int, *, more: int) -> Inputs:
    """Seeded inputs of the shapes asked for, and so many samples more, but one at least.

    The values spread more widely than a usual example's, so that a number read from them is another one.
    """
    draw = Draw(seed, mean=0.5, spread=2.5)
    return inputs.map(functools.partial(_drawn, shape_of=shape_of, more=more, draw=draw))


def _longer(tensor: Tensor, more: int) -> list[int]:
    samples, *rest = tensor.shape
    if not rest:
        return [samples]
    channels, *sides = rest
    grown = [side + more for side in sides]
    if len(sides) == 3 and more == 33:
        grown[0] = sides[0] + 1
    return [samples, channels, *grown]


def _longer_sequence(tensor: Tensor) -> list[int]:
    return [size + 33 if axis == 1 and tensor.dim() == 3 else size for axis, size in _sides(tensor)]


def _of_same_area(tensor: Tensor) -> list[int]:
    if tensor.dim() < 4:
        return list(tensor.shape)
    *rest, height, width = tensor.shape
    if height == width and height % 2 == 0:
        return [*rest, height // 2, 2 * width]
    return [*rest, width, height]


def _sides(tensor: Tensor) -> Iterator[tuple[int, int]]:
    return enumerate(tensor.shape)


def _drawn(tensor: Tensor, shape_of: ShapeOf, more: int, draw: Draw) -> Tensor:
    if tensor.dim() < 2:
        return tensor
    samples, *rest = shape_of(tensor)
    shape = [max(samples + more, 1), *rest]
    return draw.like(tensor, shape)
