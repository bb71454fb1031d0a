"""Which call reads which stored tensor, and how a call that shares one gets a tensor of its own."""

from __future__ import annotations

from bntool.core.reasons import Reason
from bntool.graph.dataflow import Edge, Graph, Op, Value
from bntool.laws import Refused

_GRAPH_LEVEL = "the exported graph can give each call its own (fold --unshare --export onnx)"


class Sharing:
    """The readers of every stored tensor, as the unsharing so far has left them.

    A module reads a tensor through its attribute, so what is given a tensor of its own is that attribute, for
    all calls that go through it. In a rewirable graph it is a single call.
    """

    def __init__(self, graph: Graph, own: dict[Edge, str] | None = None) -> None:
        self.graph = graph
        self._own = own or {}

    def copy(self) -> Sharing:
        return Sharing(self.graph, dict(self._own))

    def handle(self, op: Op, role: str) -> str:
        """The name of the tensor that a call reads now; empty where it reads none, or none that is stored."""
        if role not in op.inputs:
            return ""
        value = self.graph.input(op, role)
        own = self._own.get((op.id, role))
        if own or not value.handle:
            return own or ""
        taken = set(self._own.values())
        return next((name for name in self._names(value) if name not in taken), value.handle)

    def readers(self, op: Op, role: str) -> list[Edge]:
        """Every reading of the tensor that this call reads now."""
        own = self._own.get((op.id, role))
        return [edge for edge in self.graph.input(op, role).readers if self._own.get(edge) == own]

    def idle(self, op: Op, role: str) -> str:
        """A module that holds the same tensor and did not run; empty where there is none."""
        if (op.id, role) in self._own:
            return ""
        value, handle = self.graph.input(op, role), self.handle(op, role)
        owner = handle.rpartition(".")[0]
        same_module = {owner, *self.graph.aliases.get(owner, ())}
        for name in self._names(value):
            other = name.rpartition(".")[0]
            module = self.graph.modules.get(other)
            if other not in same_module and module is not None and not module.calls:
                return name
        return ""

    def is_apart(self, scope: str) -> bool:
        """Whether the names of this module have become modules of their own."""
        return any(self.graph.ops[reader].scope == scope for reader, _ in self._own)

    def give_own(self, op: Op, role: str, agreed: set[Edge]) -> str:
        """Let the call site of `op` read a tensor of its own from now on; the name of that tensor.

        Refused where its reading cannot be told from others, or where a call of that site is not in `agreed`.
        """
        edge, handle = (op.id, role), self.handle(op, role)
        slot = self._slot(edge)
        mine = [edge]
        if not self.graph.rewirable:
            mine = [other for other in self.readers(op, role) if self._slot(other) == slot]
            for other in self.readers(op, role):
                if not self._slot(other):
                    what = f"{self.graph.ops[other[0]].label} reads {handle}, which it does not hold itself"
                    raise Refused(Reason.WEIGHT_SHARED, f"{what}; {_GRAPH_LEVEL}")
        if any(other not in agreed for other in mine):
            what = f"{op.label} runs {len(mine)} times from one attribute, not always with this BatchNorm"
            raise Refused(Reason.CALLED_MORE_THAN_ONCE, f"{what}; {_GRAPH_LEVEL}")
        self._own.update(dict.fromkeys(mine, slot))
        return slot

    def _names(self, value: Value) -> list[str]:
        """Every name under which the tensor of a value is held."""
        names = [value.handle, *self.graph.aliases.get(value.handle, ())]
        if self.graph.rewirable:
            names += filter(None, map(self._slot, value.readers))
        return names

    def _slot(self, edge: Edge) -> str:
        """The name through which a reading finds its tensor; empty where that cannot be told."""
        op, role = self.graph.ops[edge[0]], edge[1]
        if self.graph.rewirable:
            return f"{op.place}.{role}" if op.place else ""
        place = op.place or op.scope
        held = [n for n in self._names(self.graph.input(op, role)) if n.rpartition(".")[0] == place]
        return held[0] if len(held) == 1 else ""
