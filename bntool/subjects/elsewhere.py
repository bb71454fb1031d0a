"""A module seen on other inputs than its example: small ones that lead it the same way, and longer ones.

The algebra of a fold does not depend on how large an image is. So it is proved on the smallest inputs on
which the model takes the path that it takes on its example: the same ops on the same weights, no axis shrunk
to one place, and no weight of a convolution that only padding meets any more. Where the model does things by
size (Python asks for one, or an op takes a part of an axis that changes), it is looked at on a longer input
too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator

from torch import nn

from bntool.core.errors import ObserveError
from bntool.graph.dataflow import Graph, Op
from bntool.graph.inputs import Inputs
from bntool.observe.eager import Observation, observe
from bntool.observe.inference import has_fixed_size
from bntool.observe.modules import class_name
from bntool.subjects.sizes import besides, fewer, is_telling, longer, other_sizes, other_values, smaller

_REMEMBERED = 256
"""Architectures of which a process remembers what was found."""

_refused: OrderedDict[Hashable, int] = OrderedDict()
"""How many of the smaller inputs a model of this kind refuses, or takes another path on."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What other inputs showed.

    Args:
        small: one on whose inputs the algebra is proved; None where the model takes no other input.
        covers: whether it takes the path of the example.
        long: one on an input longer than the example, where the model does things by size.
    """

    small: Observation | None = None
    covers: bool = False
    long: Observation | None = None


class Elsewhere:
    """Looks for other inputs of a model that was observed once; each is observed when first asked for.

    Args:
        model: the module.
        observation: what its example showed.
        apart: whether ops tell under which name a layer was called, as in that observation.

    `untaken` are the shapes of what was tried and not taken; what comes last of them may have been.
    """

    def __init__(self, model: nn.Module, observation: Observation, *, apart: bool = False) -> None:
        self._model, self._observation, self._apart = model, observation, apart
        self.untaken: list[str] = []

    @functools.cached_property
    def seen(self) -> Seen:
        own = self._observation
        fixed = has_fixed_size(self._model)
        small = self._smallest()
        if small is None:
            self.untaken.clear()
            return Seen(self._first_taken(other_sizes(own.inputs, fixed=fixed)))
        by_size = not fixed and _goes_by_size(own, small)
        return Seen(small, True, self._first_taken(longer(own.inputs)) if by_size else None)

    def besides(self) -> Iterator[Inputs]:
        """Inputs of other sizes than the small one, the most telling first; none is known to be taken."""
        small = self.seen.small
        if small is None or not self.seen.covers or has_fixed_size(self._model):
            return
        key = ("beside", _kind_of(self._model, self._observation))
        known = _refused.get(key, 0)
        for number, inputs in enumerate(besides(small.inputs)):
            self.untaken.append(inputs.shapes())
            if number >= known:
                _remember(key, number)  # who asks for the next one was refused this one
                yield inputs

    @property
    def is_telling(self) -> bool:
        """Whether the small input differs from the example in all that a law could be mistaken about."""
        small = self.seen.small
        return small is not None and is_telling(small.inputs, self._observation.inputs)

    def graphs(self) -> list[Graph]:
        """Of an observation on another size, and of a longer input where the model goes by size."""
        own, small, long = self._observation, self.seen.small, self.seen.long
        found = [small, long]
        if small is not None and sides_of(small.inputs) == sides_of(own.inputs):
            found.append(self._first_taken(besides(small.inputs)))
        return [one.graph for one in found if one is not None]

    def other_paths(self) -> list[Graph]:
        """Of inputs that lead the model another way: fewer samples of smaller sides where it asks for sizes,
        other values where it reads numbers.
        """
        own = self._observation
        found: list[Observation | None] = []
        if own.graph.reads_sizes and not has_fixed_size(self._model):
            found.append(self._first_taken(fewer(own.inputs, own.graph)))
        if own.graph.reads_numbers:
            found += map(self._observed, other_values((self.seen.small or own).inputs))
        return [one.graph for one in found if one is not None and one.path != own.path]

    def _smallest(self) -> Observation | None:
        """On the smallest input on which the model takes the same path."""
        own, key = self._observation, _kind_of(self._model, self._observation)
        fixed = has_fixed_size(self._model)
        start, inputs = _refused.get(key, 0), smaller(own.inputs, own.graph)
        if fixed:
            *_, whole = inputs
            start, inputs = 0, iter([whole])
        for number, one in enumerate(inputs):
            if number < start:
                continue
            found = self._observed(one)
            if found is not None and covers(found.graph, own.graph):
                if not fixed:
                    _remember(key, number)
                return found
        return None

    def _first_taken(self, inputs: Iterable[Inputs]) -> Observation | None:
        return next((found for one in inputs if (found := self._observed(one)) is not None), None)

    def _observed(self, inputs: Inputs) -> Observation | None:
        try:
            return observe(self._model, inputs, apart=self._apart)
        except ObserveError:
            self.untaken.append(inputs.shapes())
            return None


def _remember(kind: Hashable, refused: int) -> None:
    _refused[kind] = refused
    _refused.move_to_end(kind)
    if len(_refused) > _REMEMBERED:
        _refused.popitem(last=False)


def sides_of(inputs: Inputs) -> list[tuple[int, ...]]:
    """All sizes but the number of samples."""
    return [tuple(tensor.shape[1:]) for tensor in inputs.tensors().values()]


def covers(seen: Graph, own: Graph) -> bool:
    """Whether a run took the path of another one, on the same weights, and all that met numbers there did.

    `seen` is of another size: each axis that had several places has some, and of a convolution's weights as
    many meet more than padding.
    """
    if len(seen.ops) != len(own.ops):
        return False
    return all(_is_same(a, b, seen, own) for a, b in zip(seen.ops, own.ops, strict=True))


def _is_same(a: Op, b: Op, seen: Graph, own: Graph) -> bool:
    if (a.kind, a.scope, a.inputs, a.outputs) != (b.kind, b.scope, b.inputs, b.outputs):
        return False
    if any(seen.values[v].handle != own.values[v].handle for v in a.inputs.values()):
        return False
    for value in a.outputs:
        short, long = seen.values[value].shape, own.values[value].shape
        if len(short) != len(long) or any(x < 2 <= y for x, y in zip(short, long, strict=True)):
            return False
    if a.kind != "conv" or a.attrs.get("transposed"):
        return True
    return all(x or not y for x, y in zip(_ends_met(a, seen), _ends_met(b, own), strict=True))


def _ends_met(op: Op, graph: Graph) -> list[bool]:
    """Axis by axis: whether the first and the last place of the kernel meet the input, not padding alone."""
    sides, places = graph.input(op).shape[2:], graph.output(op).shape[2:]
    kernel = graph.input(op, "weight").shape[2:]
    padding = op.attrs["padding"]
    met: list[bool] = []
    for axis, (side, count, taps) in enumerate(zip(sides, places, kernel, strict=False)):
        step, span = op.attrs["stride"][axis], (taps - 1) * op.attrs["dilation"][axis]
        before = padding[axis] if not isinstance(padding, str) else span // 2 if padding == "same" else 0
        reads_first = -(-before // step)  # the first place whose first tap lies inside
        reads_last = (side - 1 + before - span) // step  # the last place whose last tap does
        met += [reads_first < count, reads_last >= 0]
    return met


_WHOLE = frozenset(
    """conv linear matmul batch_norm prelu scaled_dot_product_attention add sub rsub mul div product relu
    leaky_relu identity clamp absorbed mean sum amax amin std var std_mean var_mean vector_norm max_pool
    avg_pool adaptive_avg_pool upsample pad concat stack permute reshape flatten squeeze unsqueeze expand
    pixel_shuffle pixel_unshuffle channel_shuffle relu6 hardtanh gelu silu hardswish hardsigmoid sigmoid tanh
    elu selu celu mish softplus softmax logsigmoid layer_norm native_layer_norm group_norm native_group_norm
    dropout exp sqrt rsqrt pow abs""".split()
)
"""Kinds of ops that do the same everywhere along an axis, however long it is."""


def _goes_by_size(own: Observation, small: Observation) -> bool:
    """Whether the model may do something else on a longer input: Python asked how long a tensor is, or an op
    takes parts of an axis that changes with the input.
    """
    if own.graph.reads_sizes:
        return True
    return any(
        a.kind not in _WHOLE and _cuts(a, own.graph, small.graph)
        for a in own.graph.ops
        if not all(own.graph.values[value].constant for value in a.outputs)
    )


def _cuts(op: Op, own: Graph, small: Graph) -> bool:
    shapes = [(own.values[v].shape, small.values[v].shape) for v in (*op.inputs.values(), *op.outputs)]
    axis = op.attrs.get("axis")
    if isinstance(axis, int):
        long, short = shapes[0]
        return axis >= len(long) or long[axis] != short[axis]
    return any(long[1:] != short[1:] for long, short in shapes)


def _kind_of(model: nn.Module, observation: Observation) -> Hashable:
    """An architecture on inputs of some shapes."""
    shapes = tuple(tuple(tensor.shape) for tensor in observation.inputs.tensors().values())
    return (
        class_name(type(model)),
        len(observation.graph.ops),
        tuple(observation.graph.signature().items()),
        shapes,
    )
