"""Move a BatchNorm's affine map along the graph until linear layers take it in, or it is refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Set

from bntool.core.reasons import Reason
from bntool.folding.norms import Norm
from bntool.folding.traversal import Agenda, Take, Way
from bntool.graph.affine import Affine, identity, merge
from bntool.graph.dataflow import Edge, Graph, Op, Value, is_out
from bntool.laws import LAWS, Refused
from bntool.laws.base import Down, Up
from bntool.laws.nonlinear import NONLINEAR
from bntool.laws.taking import TAKERS, input_map, output_demand

_MAX_ATTEMPTS = 16
"""How many ways to hand out shifts among summed branches are tried for one BatchNorm."""
_PARTIAL = frozenset({"slice", "select", "index_select"})
"""Readers that look at a part of a value only, and let the rest become anything."""


class Mover:
    """Finds ways through a graph in which the BatchNorms in `gone` are already nothing.

    Laws see it as their context.
    """

    def __init__(self, graph: Graph, gone: set[int]) -> None:
        self.graph = graph
        self.gone = gone
        self.changed: set[str] = set()
        self._way = Way()
        self._takes_summands = self._passed_summand = self._undoes = False
        self._others: dict[Edge, Affine] = {}
        self._choices: list[int] = []
        self._widths: list[int] = []
        self._last = 0

    def find_way(
        self, norm: Norm, up: dict[int, Affine], down: dict[int, Affine], *, undo: bool = False
    ) -> Way:
        """Move `up` demands and carry `down` maps: summands stay as they are, or else take their part in.

        With `undo`, other readers of what becomes s·x + t may take (x − t)/s in.
        """
        self._takes_summands = self._passed_summand = False
        self._undoes = undo
        try:
            return self._some_way(norm, up, down)
        except Refused as refusal:
            if not self._passed_summand:
                raise
            self._takes_summands = True
            with contextlib.suppress(Refused):
                return self._some_way(norm, up, down)
            raise Refused(refusal.reason, refusal.detail) from None

    def _some_way(self, norm: Norm, up: dict[int, Affine], down: dict[int, Affine]) -> Way:
        """Try the ways to hand out shifts until one holds."""
        self._choices = []
        for _ in range(_MAX_ATTEMPTS):
            self._widths = []
            way = self._way = Way()
            try:
                self._others = {}
                if up:
                    self._upstream(norm, up, way)
                if down:
                    self._downstream(norm, down, way)
                return way
            except Refused:
                if not self._next_choice():
                    raise
        raise Refused(Reason.MIXED_BRANCHES, "no way to hand out the shift among the branches was found")

    def choose(self, options: int) -> int:
        position = len(self._widths)
        self._widths.append(options)
        if position == len(self._choices):
            self._choices.append(0)
        return self._choices[position]

    def take_in(self, op: Op, role: str, affine: Affine) -> bool:
        self._passed_summand = True
        if not self._takes_summands:
            return False
        shape = self.graph.input(op, role).shape
        sizes = affine.scale.shape
        own = sizes[len(sizes) - len(shape) :]
        vector = affine.then("fill").then("reshape", tuple(sizes), tuple(own))
        self._way.takes.append(Take(op, "summand", vector, role))
        self._way.laws.append("summand")
        return True

    def _next_choice(self) -> bool:
        del self._choices[len(self._widths) :]
        while self._choices:
            if self._choices[-1] + 1 < self._widths[len(self._choices) - 1]:
                self._choices[-1] += 1
                return True
            self._choices.pop()
        return False

    def _upstream(self, norm: Norm, maps: dict[int, Affine], way: Way) -> None:
        """Turn demands on the BatchNorm's inputs into demands on ever earlier values."""
        demands: dict[int, dict[Edge, Affine]] = {}
        visited = {op.id for op in norm.ops}
        agenda = Agenda(latest_first=True)
        self._last = max(op.id for op in norm.ops)

        def demand(value: Value, edge: Edge, affine: Affine) -> None:
            if value.producer is None:
                what = "a constant" if value.constant else "the model's input"
                raise Refused(Reason.REACHES_INPUT, f"it is read straight from {what}")
            self.require_nothing_later(value)
            _require_fit(value, affine)
            demands.setdefault(value.id, {})[edge] = affine
            agenda.add(value.producer)

        for op in norm.ops:
            demand(self.graph.input(op), (op.id, "input"), maps[op.id])
        for number in agenda:
            op = self.graph.ops[number]
            outputs = [self._agreed(self.graph.values[v], demands.get(v, {})) for v in op.outputs]
            if all(affine.is_identity for affine in outputs):
                continue
            visited.add(number)
            if self._takes(op):
                if len(op.outputs) != 1:
                    raise Refused(Reason.UNKNOWN_OP, f"{op.label} has several outputs")
                way.takes.append(Take(op, "output", output_demand(self, op, outputs[0])))
                way.laws.append(op.kind)
                continue
            for role, affine in self._law(op)[0](self, op, outputs).items():
                if not affine.is_identity:
                    demand(self.graph.input(op, role), (op.id, role), affine)
            self._passed(op, way)
        if self._others:
            self._undo(visited, way)

    def _undo(self, visited: set[int], way: Way) -> None:
        """Carry the inverse map to the readers of changed values that asked for no change."""
        inverse: dict[Edge, Affine] = {}
        known: dict[int, Affine] = {}  # the readers of one value have one map
        for edge, affine in self._others.items():
            if edge[0] in visited:
                raise self._read_elsewhere(self.graph.input(self.graph.ops[edge[0]], edge[1]), edge[0])
            if id(affine) not in known:
                way.condition = max(way.condition, _condition(affine))
                if way.condition > self.graph.coarsest**-0.5:
                    what = f"its inverse has condition number {way.condition:.2g}"
                    raise Refused(Reason.ZERO_SCALE, f"{what}, and other readers need it")
                known[id(affine)] = affine.then("inverse")
            inverse[edge] = known[id(affine)]
        self._carry(inverse, way, forbidden=visited)
        way.laws.append("inverse")

    def require_nothing_later(self, value: Value) -> None:
        """What runs after the BatchNorm asks for nothing: no need to go on to find that out."""
        for reader, _ in () if self._undoes else value.readers:
            if reader > self._last and self.graph.ops[reader].kind not in _PARTIAL:
                raise self._read_elsewhere(value, reader)

    def _agreed(self, value: Value, asked: dict[Edge, Affine]) -> Affine:
        """The one map that every reader of a value agrees on."""
        own = identity(len(value.shape))
        if not asked:
            return own
        readers: list[tuple[Edge, Affine]] = []
        others: list[Edge] = []
        for edge in value.readers:
            op, role = self.graph.ops[edge[0]], edge[1]
            if edge in asked:
                readers.append((edge, asked[edge]))
            elif op.kind in _PARTIAL and role == "input":
                untouched = identity(len(self.graph.output(op).shape))
                readers.append((edge, LAWS[op.kind][0](self, op, [untouched])["input"]))
            elif self._undoes:
                others.append(edge)
            else:
                readers.append((edge, own))
        first, agreed = readers[0]
        for edge, other in readers[1:]:
            joined = merge(agreed, other)
            if joined is None:
                raise self._read_elsewhere(value, (first if edge in asked else edge)[0])
            agreed = joined
        self._require_free(value)
        if others and not agreed.is_identity:
            # where nobody asks for anything, all of them see what was there
            agreed = agreed.then("fill")
            self._others.update(dict.fromkeys(others, agreed))
        return agreed

    def _read_elsewhere(self, value: Value, reader: int) -> Refused:
        producer = self.graph.producer(value)
        what = producer.label if producer else "the value"
        return Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{what} is also read by {self.graph.ops[reader].label}")

    def _downstream(self, norm: Norm, maps: dict[int, Affine], way: Way) -> None:
        """Carry the map over the BatchNorm's outputs on through every reader."""
        edges: dict[Edge, Affine] = {}
        for op in norm.ops:
            value, affine = self.graph.output(op), maps[op.id]
            if affine.is_identity:
                continue
            self._require_carries(value, affine)
            edges.update(dict.fromkeys(value.readers, affine))
        self._carry(edges, way)

    def _require_carries(self, value: Value, affine: Affine) -> None:
        self._require_free(value)
        if not value.readers:
            raise Refused(Reason.REACHES_OUTPUT, "nothing reads it")
        _require_fit(value, affine)

    def _carry(self, carried: dict[Edge, Affine], way: Way, forbidden: Set[int] = frozenset()) -> None:
        """Carry maps from edges on through every reader, until layers take them in."""
        agenda = Agenda()
        for reader, _ in carried:
            agenda.add(reader)
        for number in agenda:
            op = self.graph.ops[number]
            if number in forbidden:
                raise Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{op.label} reads it both ways")
            inputs = {role: carried[number, role] for role in op.inputs if (number, role) in carried}
            if self._takes(op):
                if set(inputs) != {"input"}:
                    raise Refused(Reason.WEIGHT_COMPUTED, f"a weight of {op.label} depends on the data")
                way.takes.append(Take(op, "input", input_map(self, op, inputs["input"])))
                way.laws.append(op.kind)
                continue
            law = self._law(op)[1]
            if any(map(is_out, inputs)):
                raise Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{op.label} would write over what changes")
            outputs = law(self, op, inputs)
            for value, affine in zip(map(self.graph.values.__getitem__, op.outputs), outputs, strict=True):
                if affine.is_identity:
                    continue
                self._require_carries(value, affine)
                carried.update(dict.fromkeys(value.readers, affine))
                for reader, _ in value.readers:
                    agenda.add(reader)
            self._passed(op, way)

    def _takes(self, op: Op) -> bool:
        return op.id not in self.gone and (op.kind in TAKERS or op.kind == "batch_norm")

    def _law(self, op: Op) -> tuple[Up, Down]:
        if op.id in self.gone:
            return LAWS["identity"]
        try:
            return LAWS[op.kind]
        except KeyError:
            if op.kind in NONLINEAR:
                raise Refused(Reason.NONLINEAR, f"{op.label} lets no affine map by") from None
            raise Refused(Reason.UNKNOWN_OP, f"no law says how a map passes {op.label}") from None

    def _passed(self, op: Op, way: Way) -> None:
        if op.id not in self.gone:
            way.laws.append(op.kind)

    def _require_free(self, value: Value) -> None:
        """A value that somebody else sees must not change."""
        producer = self.graph.producer(value)
        what = producer.label if producer else "the input"
        if value.is_output:
            raise Refused(Reason.REACHES_OUTPUT, f"the output of {what} is returned by the model")
        if value.escapes:
            raise Refused(Reason.OUTPUT_ESCAPES, f"the output of {what} is kept beyond the forward")
        if value.watched:
            raise Refused(Reason.HOOKED, f"a hook on {value.watched[0]} sees the output of {what}")


def _condition(affine: Affine) -> float:
    """By how much undoing x → s·x + t can magnify what rounding did.

    (1 + |s| + |t|)·(1 + |1/s| + |t/s|) bounds it for each channel; where s = 0 it is infinite, and of
    a map that changes nothing it is four.
    """
    scale, shift = affine.scale.abs(), affine.shift.abs()
    found = (1 + scale + shift) * (1 + (1 + shift) / scale)
    return math.inf if bool((scale == 0).any()) else float(found.max())


def _require_fit(value: Value, affine: Affine) -> None:
    """A map must have the sizes of its value: those of a graph that is not run may be made up."""
    sizes = affine.scale.shape
    if len(sizes) != len(value.shape) or any(
        a not in (1, b) for a, b in zip(sizes, value.shape, strict=True)
    ):
        raise Refused(
            Reason.AXIS_MISMATCH, f"a map of shape {list(sizes)} meets a value of shape {list(value.shape)}"
        )
