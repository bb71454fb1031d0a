"""The values of a program's graph: what each node makes, where it lies in memory, and what writes over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from bntool.graph.dataflow import Graph
from bntool.observe.program_calls import Stored, layer_names, linear_calls
from bntool.observe.program_memory import Memory, nodes_in
from bntool.observe.program_nodes import arguments_of, draws, operator_of, sharing, written_by
from bntool.observe.program_sizes import Sizes

_SMALL_CONSTANT = 1 << 16


class ProgramValues:
    """A graph that grows node by node.

    Args:
        program: whose nodes they are.
        sizes: which of the two sets of numbers stands for open sizes.
    """

    def __init__(self, program: ExportedProgram, sizes: int) -> None:
        self.program = program
        self.graph = Graph()
        self.sizes = Sizes(program, sizes)
        self.memory = Memory()
        self.stored = Stored(program)
        self.calls = linear_calls(program, self.stored)
        self.turned = {node for call in self.calls.values() for node in call.turned}
        self.layer_of = layer_names(iter(self.calls.values()), self.stored)
        self._by_handle: dict[str, int] = {}
        self._written = self._find_written()
        self.nodes: dict[int, Node] = {}
        self.values: dict[Node, int] = {}
        self.parts: dict[Node, dict[int, int]] = {}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def handle(self, name: str) -> str:
        """The name under which a stored tensor is edited: a layer's weight, or its own."""
        layer = self.layer_of.get(name)
        return f"{layer}.weight" if layer is not None else name

    def new(self, value: Tensor, *, constant: bool = False) -> int:
        return self.graph.add_value(self.sizes.shape(value), constant=constant, dtype=str(value.dtype)).id

    def values_of(self, node: Node) -> list[int]:
        own = [self.values[node]] if node in self.values else []
        return own + list(self.parts.get(node, {}).values())

    def add(
        self,
        node: Node,
        kind: str,
        inputs: dict[str, int],
        attrs: dict[str, Any],
        scope: str,
        place: str = "",
    ) -> None:
        name = operator_of(node)
        bound = arguments_of(node) if name else {}
        targets = [n for a in written_by(node, name, bound) for n in nodes_in([bound.get(a)])] if name else []
        made = self._results(node, targets, inputs)
        values = tuple(value for value in made.values())
        sources, same_place = sharing(name, node, bound)
        seen = {value for source in sources for value in self.values_of(source)}
        op = self.graph.add_op(
            kind,
            inputs,
            values,
            attrs=attrs,
            scope=scope,
            inplace=bool(targets),
            views=tuple(role for role, value in inputs.items() if value in seen),
            place=place,
        )
        self.nodes[op.id] = node
        self.memory.add(node, sources, same_place)
        if isinstance(node.meta.get("val"), tuple | list):
            self.parts[node] = made
        elif made:
            self.values[node] = made[0]
            self.graph.values[made[0]].name = node.name
        for target, value in zip(targets, values, strict=False):
            self._overwrite(node, target, value)

    def _results(self, node: Node, targets: list[Node], inputs: dict[str, int]) -> dict[int, int]:
        if targets:
            return {i: self.new(target.meta["val"]) for i, target in enumerate(targets)}
        value = node.meta.get("val")
        found = dict(enumerate(value)) if isinstance(value, tuple | list) else {0: value}
        numbers = self._computed(node) if len(found) == 1 else None
        fixed = numbers is not None or (bool(inputs) and self._is_fixed(node, inputs))
        made = {i: self.new(v, constant=fixed) for i, v in found.items() if isinstance(v, Tensor)}
        if numbers is not None and 0 in made:
            self.graph.constants[made[0]] = numbers
        return made

    def _is_fixed(self, node: Node, inputs: Mapping[str, int]) -> bool:
        return not draws(node) and all(self.graph.values[value].constant for value in inputs.values())

    def _computed(self, node: Node) -> Tensor | None:
        """The numbers of a small constant, computed by the operator itself."""
        value = node.meta.get("val")
        small = isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)
        if not (small and operator_of(node)) or draws(node) or value.numel() > _SMALL_CONSTANT:  # type: ignore[union-attr]
            return None
        known: dict[Node, Tensor] = {}
        for source in node.all_input_nodes:
            if source not in self.values:
                return None
            constant = self.graph.constant(self.graph.values[self.values[source]])
            if constant is None or constant.numel() > _SMALL_CONSTANT:
                return None
            known[source] = constant
        arguments = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        result = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None

    def _overwrite(self, node: Node, target: Node, value: int) -> None:
        """An in-place write: every node that still reads the memory sees something new."""
        if any(storage.op == "placeholder" for storage in self.memory.storages(target)):
            self.graph.values[value].escapes = True
        for other in (target, *self.memory.sharing(target)):
            later = any(self.order[user] > self.order[node] for user in other.users)
            if other is node or other not in self.values or not later:
                continue
            if self.memory.same_place(other, target):
                self.values[other] = value
                continue
            before = self.values[other]
            mixed = self.new(other.meta["val"])
            self.graph.add_op(
                "overwritten_view", {"input": before, "other": value}, (mixed,), attrs={}, views=("other",)
            )
            self.values[other] = mixed

    # -- where values come from -------------------------------------------------------------------------

    def _find_written(self) -> set[str]:
        """Stored tensors that the program writes to: what they hold at one moment is no constant."""
        signature = self.program.graph_signature
        mutated = {
            *signature.buffers_to_mutate.values(),
            *getattr(signature, "parameters_to_mutate", {}).values(),
        }
        memory = Memory()
        for node in self.program.graph.nodes:
            name = operator_of(node)
            bound = arguments_of(node) if name else {}
            memory.add(node, *sharing(name, node, bound))
            for argument in written_by(node, name, bound) if name else ():
                for target in nodes_in([bound.get(argument)]):
                    mutated.update(self.stored.name(storage) for storage in memory.storages(target))
        return {name for name, names in self.stored.names_of.items() if mutated & {name, *names}}

    def placeholder(self, node: Node) -> None:
        """An input, or a stored tensor; one that is written to is no constant."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        name = self.stored.name(node)
        self.memory.add(node, [])
        if not name or name in self._written:
            self.values[node] = self.new(value)
            return
        handle = self.handle(name)
        if handle not in self._by_handle:
            tensor = self.stored.tensors[name]
            self._by_handle[handle] = self.graph.add_value(
                tuple(tensor.shape), handle=handle, constant=True, dtype=str(tensor.dtype)
            ).id
            self.graph.tensors[handle] = tensor
        self.values[node] = self._by_handle[handle]

    def attribute(self, node: Node) -> None:
        """A tensor that the graph module holds."""
        found: Any = self.program.graph_module
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        if isinstance(found, Tensor):
            made = self.graph.add_value(tuple(found.shape), constant=True, dtype=str(found.dtype))
            self.graph.constants[made.id] = found
            self.values[node] = made.id
            self.memory.add(node, [])

    def outputs(self, node: Node) -> None:
        """What the program returns."""
        for value in dict.fromkeys(v for source in node.all_input_nodes for v in self.values_of(source)):
            self.graph.values[value].is_output = True
            if self.graph.values[value].handle:
                self.graph.add_op("output", {"input": value}, (), attrs={})
