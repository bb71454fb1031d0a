"""Move a BatchNorm's affine map along the graph until linear layers take it in, or it is refused."""

from __future__ import annotations

import contextlib
from typing import Literal

from bntool.core.reasons import Reason
from bntool.folding.norms import Norm
from bntool.folding.traversal import Agenda, Choices, Take, Way, require_fit
from bntool.graph.affine import Affine, condition, identity, merge
from bntool.graph.dataflow import Edge, Graph, Op, Value, is_out
from bntool.laws import LAWS, Refused
from bntool.laws.base import Down, Up, stored_behind
from bntool.laws.nonlinear import NONLINEAR
from bntool.laws.taking import TAKERS, input_map, output_demand

_MAX_ATTEMPTS = 16
"""How many ways to hand out shifts among summed branches are tried for one BatchNorm."""
_PARTIAL = frozenset({"slice", "select", "index_select"})
"""Readers that look at a part of a value only, and let the rest become anything."""

Others = Literal["stay", "undo", "give way"]
"""What becomes of values and readers beside the way."""


class Mover:
    """Finds ways through a graph in which the BatchNorms in `gone` are already nothing.

    Laws see it as their context.
    """

    def __init__(self, graph: Graph, gone: set[int]) -> None:
        self.graph = graph
        self.gone = gone
        self.changed: set[str] = set()
        self._way = Way()
        self._takes_summands = self._passed_summand = self._undoes = self._asks = False
        self._others: dict[Edge, Affine] = {}
        self._asked: dict[Edge, Affine] = {}
        self._visited: set[int] = set()
        self._choices = Choices()
        self._last = 0

    def find_way(
        self,
        norm: Norm,
        up: dict[int, Affine],
        down: dict[int, Affine],
        others: Others = "stay",
    ) -> Way:
        """Move `up` demands and carry `down` maps: summands stay as they are, or else take their part in.

        Other readers of what becomes s·x + t stay, or "undo" it: they take (x − t)/s in. The other branch of
        a sum that a map is carried to may "give way", too.
        """
        self._takes_summands = self._passed_summand = False
        self._undoes, self._asks = others != "stay", others == "give way"
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
        self._choices = Choices()
        self._last = max(op.id for op in norm.ops)
        for _ in range(_MAX_ATTEMPTS):
            self._choices.restart()
            way = self._way = Way()
            self._others, self._asked = {}, {}
            self._visited = {op.id for op in norm.ops}
            try:
                if up:
                    self._upstream({(op.id, "input"): up[op.id] for op in norm.ops}, way)
                if down:
                    self._downstream(norm, down, way)
                while self._asked:
                    asked, self._asked = self._asked, {}
                    self._upstream(asked, way)
                return way
            except Refused:
                if not self._choices.next():
                    raise
        raise Refused(Reason.MIXED_BRANCHES, "no way to hand out the shift among the branches was found")

    def choose(self, options: int) -> int:
        return self._choices.choose(options)

    @property
    def asks(self) -> bool:
        return self._asks

    def ask(self, op: Op, role: str, affine: Affine) -> None:
        self._asked[op.id, role] = self._inverse(affine, self._way)

    def take_in(self, op: Op, role: str, affine: Affine) -> bool:
        self._passed_summand = True
        if not self._takes_summands:
            return False
        value = self.graph.input(op, role)
        stored = stored_behind(self.graph, value)
        assert stored is not None
        sizes = affine.scale.shape
        own = sizes[len(sizes) - len(value.shape) :]
        vector = affine.then("fill").then("reshape", tuple(sizes), tuple(own))
        if stored is not value:
            vector = vector.then("reshape", value.shape, stored.shape)
        self._way.takes.append(Take(op, "summand", vector, handle=stored.handle))
        self._way.laws.append("summand")
        return True

    def _upstream(self, maps: dict[Edge, Affine], way: Way) -> None:
        """Turn demands on the values that these edges read into demands on ever earlier values."""
        demands: dict[int, dict[Edge, Affine]] = {}
        agenda = Agenda(latest_first=True)

        def demand(edge: Edge, affine: Affine) -> None:
            value = self.graph.input(self.graph.ops[edge[0]], edge[1])
            if value.producer is None:
                what = "a constant" if value.constant else "the model's input"
                raise Refused(Reason.REACHES_INPUT, f"it is read straight from {what}")
            self.require_nothing_later(value)
            require_fit(value, affine)
            demands.setdefault(value.id, {})[edge] = affine
            agenda.add(value.producer)

        for edge, affine in maps.items():
            demand(edge, affine)
        for number in agenda:
            op = self.graph.ops[number]
            outputs = [self._agreed(self.graph.values[v], demands.get(v, {})) for v in op.outputs]
            if all(affine.is_identity for affine in outputs):
                continue
            self._visit(op)
            if self._takes(op):
                if len(op.outputs) != 1:
                    raise Refused(Reason.UNKNOWN_OP, f"{op.label} has several outputs")
                way.takes.append(Take(op, "output", output_demand(self, op, outputs[0])))
                way.laws.append(op.kind)
                continue
            for role, affine in self._law(op)[0](self, op, outputs).items():
                if not affine.is_identity:
                    demand((op.id, role), affine)
            self._passed(op, way)
        if self._others:
            self._undo(way)

    def _visit(self, op: Op) -> None:
        """Where readers take the inverse in, what an op sees and gives is settled once."""
        if self._undoes and op.id in self._visited:
            raise Refused(Reason.OUTPUT_USED_ELSEWHERE, f"{op.label} reads it both ways")
        self._visited.add(op.id)

    def _undo(self, way: Way) -> None:
        """Carry the inverse map to the readers of changed values that asked for no change."""
        others, self._others = self._others, {}
        inverse: dict[Edge, Affine] = {}
        known: dict[int, Affine] = {}  # the readers of one value have one map
        for edge, affine in others.items():
            if edge[0] in self._visited:
                raise self._read_elsewhere(self.graph.input(self.graph.ops[edge[0]], edge[1]), edge[0])
            if id(affine) not in known:
                known[id(affine)] = self._inverse(affine, way)
            inverse[edge] = known[id(affine)]
        self._carry(inverse, way)

    def _inverse(self, affine: Affine, way: Way) -> Affine:
        """(x − t)/s, where enough digits outlive that."""
        way.condition = max(way.condition, condition(affine))
        if way.condition > self.graph.coarsest**-0.5:
            what = f"its inverse has condition number {way.condition:.2g}"
            raise Refused(Reason.ZERO_SCALE, f"{what}, and other readers need it")
        if "inverse" not in way.laws:
            way.laws.append("inverse")
        return affine.then("inverse")

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
        require_fit(value, affine)

    def _carry(self, carried: dict[Edge, Affine], way: Way) -> None:
        """Carry maps from edges on through every reader, until layers take them in."""
        agenda = Agenda()
        for reader, _ in carried:
            agenda.add(reader)
        for number in agenda:
            op = self.graph.ops[number]
            self._visit(op)
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
