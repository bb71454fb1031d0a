"""Move a BatchNorm's affine map along the graph until linear layers take it in, or it is refused."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator

from bntool.core.reasons import Reason
from bntool.folding.norms import Norm
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


@dataclasses.dataclass(frozen=True)
class Take:
    """A linear layer takes a vector of channels in at its output or input side."""

    op: Op
    side: str
    vector: Affine


@dataclasses.dataclass
class Way:
    """What one successful move collected: the layers that take in, and the laws passed on the way."""

    takes: list[Take] = dataclasses.field(default_factory=list)
    laws: list[str] = dataclasses.field(default_factory=list)


class _Agenda:
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


class Mover:
    """Finds ways through a graph in which the BatchNorms in `gone` are already nothing.

    Laws see it as their context.
    """

    def __init__(self, graph: Graph, gone: set[int]) -> None:
        self.graph = graph
        self.gone = gone
        self._choices: list[int] = []
        self._widths: list[int] = []
        self._last = 0

    def find_way(self, norm: Norm, up: dict[int, Affine], down: dict[int, Affine]) -> Way:
        """Move `up` demands and carry `down` maps; tries the ways to hand out shifts until one holds."""
        self._choices = []
        for _ in range(_MAX_ATTEMPTS):
            self._widths = []
            way = Way()
            try:
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
        agenda = _Agenda(latest_first=True)
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

    def require_nothing_later(self, value: Value) -> None:
        """What runs after the BatchNorm asks for nothing: no need to go on to find that out."""
        for reader, _ in value.readers:
            if reader > self._last and self.graph.ops[reader].kind not in _PARTIAL:
                raise self._read_elsewhere(value, reader)

    def _agreed(self, value: Value, asked: dict[Edge, Affine]) -> Affine:
        """The one map that every reader of a value agrees on."""
        own = identity(len(value.shape))
        if not asked:
            return own
        readers: list[Affine] = []
        for edge in value.readers:
            if edge in asked:
                readers.append(asked[edge])
                continue
            op, role = self.graph.ops[edge[0]], edge[1]
            if op.kind in _PARTIAL and role == "input":
                untouched = identity(len(self.graph.output(op).shape))
                readers.append(LAWS[op.kind][0](self, op, [untouched])["input"])
            else:
                readers.append(own)
        agreed = readers[0]
        for index, other in enumerate(readers[1:], 1):
            joined = merge(agreed, other)
            if joined is None:
                edge = value.readers[0] if value.readers[index] in asked else value.readers[index]
                raise self._read_elsewhere(value, edge[0])
            agreed = joined
        self._require_free(value)
        return agreed

    def _read_elsewhere(self, value: Value, reader: int) -> Refused:
        producer = self.graph.producer(value)
        what = producer.label if producer else "the value"
        return Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{what} is also read by {self.graph.ops[reader].label}")

    def _downstream(self, norm: Norm, maps: dict[int, Affine], way: Way) -> None:
        """Carry the map over the BatchNorm's outputs on through every reader."""
        carried: dict[int, Affine] = {}
        agenda = _Agenda()

        def carry(value: Value, affine: Affine) -> None:
            if affine.is_identity:
                return
            self._require_free(value)
            if not value.readers:
                raise Refused(Reason.REACHES_OUTPUT, "nothing reads it")
            _require_fit(value, affine)
            carried[value.id] = affine
            for reader, _ in value.readers:
                agenda.add(reader)

        for op in norm.ops:
            carry(self.graph.output(op), maps[op.id])
        for number in agenda:
            op = self.graph.ops[number]
            inputs = {role: carried[v] for role, v in op.inputs.items() if v in carried}
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
            for value, affine in zip(op.outputs, outputs, strict=True):
                carry(self.graph.values[value], affine)
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


def _require_fit(value: Value, affine: Affine) -> None:
    """A map must have the sizes of its value: those of a graph that is not run may be made up."""
    sizes = affine.scale.shape
    if len(sizes) != len(value.shape) or any(
        a not in (1, b) for a, b in zip(sizes, value.shape, strict=True)
    ):
        raise Refused(
            Reason.AXIS_MISMATCH, f"a map of shape {list(sizes)} meets a value of shape {list(value.shape)}"
        )
