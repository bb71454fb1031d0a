"""A copy of an exported program to work on: its nodes and tensors by name, and what comes or goes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from bntool.graph.inputs import map_tensors
from bntool.observe.program_nodes import scope_of

_BEFORE = {
    InputKind.PARAMETER: (InputKind.PARAMETER,),
    InputKind.BUFFER: (InputKind.PARAMETER, InputKind.BUFFER),
    InputKind.CONSTANT_TENSOR: (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR),
}
"""The kinds of input that come before a new one of a kind."""
_PREFIX = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}


class ProgramCopy:
    """The parts of a new program; nothing of the given one changes, and no tensor is shared with it.

    Tensors tied to each other stay tied.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._given = program
        self.graph_module = copy.deepcopy(program.graph_module)
        self.graph = self.graph_module.graph
        for given, copied in zip(program.graph.nodes, self.graph.nodes, strict=True):
            copied.name = given.name  # torch.fx renames what is named like a builtin (`input`)
        self.nodes: dict[str, Node] = {node.name: node for node in self.graph.nodes}
        self._operands = {node.name: node.all_input_nodes for node in self.graph.nodes}
        self.signature = copy.deepcopy(program.graph_signature)
        self.calls = copy.deepcopy(program.module_call_graph)
        tensors = {"state": program.state_dict, "constants": program.constants}
        with torch.no_grad():
            owned = copy.deepcopy(tensors, _detached(tensors))
        self.state, self.constants = owned["state"], owned["constants"]

    def finish(self) -> ExportedProgram:
        """The program as it now stands, validated."""
        self.graph.lint()
        self.graph_module.recompile()
        return ExportedProgram(
            root=self.graph_module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state,
            range_constraints=dict(self._given.range_constraints),
            module_call_graph=self.calls,
            example_inputs=self._given.example_inputs,
            constants=self.constants,
            verifiers=self._given.verifiers,
        )

    # -- tensors ----------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        found = self.state.get(name, self.constants.get(name))
        assert isinstance(found, Tensor)
        return found

    def set_tensor(self, names: Iterable[str], tensor: Tensor) -> None:
        """Put a tensor under every name that one tensor has; also where no placeholder stands for it."""
        old = self.tensor(next(iter(names)))
        new: Tensor = tensor
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for store in (self.state, self.constants):
            for name, held in list(store.items()):
                if held is old or name in names:
                    store[name] = new

    def widen(self) -> None:
        """Every floating-point tensor in float64, as the nodes declare theirs; tied tensors stay tied."""
        done: dict[int, Tensor] = {}
        for store in (self.state, self.constants):
            for name, held in list(store.items()):
                if isinstance(held, Tensor) and held.is_floating_point():
                    if id(held) not in done:
                        wide = held.detach().double()
                        done[id(held)] = nn.Parameter(wide) if isinstance(held, nn.Parameter) else wide
                    store[name] = done[id(held)]
        for node in self.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = map_tensors(
                    node.meta["val"], lambda t: t.double() if t.is_floating_point() else t
                )

    def add_parameter(self, name: str, tensor: Tensor, like: str) -> Node:
        """A new parameter with its placeholder, behind those there are; it trains where `like` does."""
        self.state[name] = nn.Parameter(tensor, requires_grad=self.tensor(like).requires_grad)
        source = next(node for node in self.graph.nodes if self._target_of(node) == like)
        return self._add_placeholder(InputKind.PARAMETER, name, tensor, source)

    def add_buffer(self, name: str, tensor: Tensor, like: str) -> Node:
        """A new buffer with its placeholder, behind those there are."""
        self.state[name] = tensor
        source = next(node for node in self.graph.nodes if self._target_of(node) == like)
        return self._add_placeholder(InputKind.BUFFER, name, tensor, source)

    def add_constant(self, name: str, tensor: Tensor, like: Node) -> Node:
        """A new constant with its placeholder, of the type of `like`."""
        self.constants[name] = tensor
        return self._add_placeholder(InputKind.CONSTANT_TENSOR, name, tensor, like)

    def _add_placeholder(self, kind: InputKind, name: str, tensor: Tensor, source: Node) -> Node:
        position = sum(1 for spec in self.signature.input_specs if spec.kind in _BEFORE[kind])
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        label = _PREFIX[kind] + name.replace(".", "_")
        if position < len(placeholders):
            place = self.graph.inserting_before(placeholders[position])
        else:
            place = self.graph.inserting_after(placeholders[-1])
        with place:
            node: Node = self.graph.placeholder(label)
        node.meta["val"] = source.meta["val"].new_empty(tuple(tensor.shape))
        persistent = True if kind is InputKind.BUFFER else None
        spec = InputSpec(kind, TensorArgument(node.name), name, persistent)
        self.signature.input_specs.insert(position, spec)
        return node

    def give_own(self, call: Node, names: Collection[str]) -> str:
        """Let one call read a clone of the stored tensor that has these names; the name of the clone.

        That is the name of the call's own module, where the exporter left it without a reader.
        """
        source, turned = self._source_of(call, names)
        name = str(self._target_of(source))
        old, parameter = self.tensor(name), self._spare(call, names)
        clone = old.detach().clone()
        if parameter is None:
            made = self.free_name(f"{name}_unshared")
            parameter = self.add_parameter(made, clone, name)
        else:
            made = str(self._target_of(parameter))
            own = nn.Parameter(clone, old.requires_grad) if isinstance(old, nn.Parameter) else clone
            (self.state if made in self.state else self.constants)[made] = own
        if turned is None:
            call.replace_input_with(source, parameter)
            return made
        with self.graph.inserting_before(call):
            turn = self.graph.node_copy(turned, lambda node: parameter if node is source else node)
        call.replace_input_with(turned, turn)
        return made

    def _spare(self, call: Node, names: Collection[str]) -> Node | None:
        """The placeholder of one of these names that belongs to the call's module and has no reader."""
        scope = scope_of(call)
        spare: list[Node] = [n for n in self.graph.nodes if n.op == "placeholder" and not n.users]
        own = (n for n in spare if self._target_of(n) in names)
        return next((n for n in own if str(self._target_of(n)).rpartition(".")[0] == scope), None)

    def _source_of(self, call: Node, names: Collection[str]) -> tuple[Node, Node | None]:
        """The placeholder of a stored tensor that a call reads, and the node that turns it on the way."""
        for node in call.all_input_nodes:
            if self._target_of(node) in names:
                return node, None
        turned = (node for node in call.all_input_nodes if node.op == "call_function")
        return next(
            (source, node)
            for node in turned
            for source in node.all_input_nodes
            if self._target_of(source) in names
        )

    def free_name(self, wanted: str) -> str:
        taken = {*self.state, *self.constants, *(spec.target for spec in self.signature.input_specs)}
        name, number = wanted, 0
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        return name

    def _target_of(self, node: Node) -> str | None:
        return next((s.target for s in self.signature.input_specs if _name(s) == node.name), None)

    # -- nodes ------------------------------------------------------------------------------------------

    def replace(self, node: Node, other: Node) -> None:
        """Let every reader of `node`, the outputs too, read `other`; `node` goes."""
        node.replace_all_uses_with(other)
        self._rename(node, other)
        self.graph.erase_node(node)

    def hand_over(self, nodes: Sequence[Node], heir: Node) -> set[str]:
        """Whoever else reads what `nodes` give, the outputs too, reads `heir`; the nodes go.

        They stand in the order in which they run, and the last one is what the others are for. Returns the
        names of the stored tensors that they read.
        """
        going = set(nodes)
        stored = {self._target_of(source) for node in nodes for source in node.all_input_nodes}
        for node in nodes:
            node.replace_all_uses_with(heir, delete_user_cb=lambda user: user not in going)
            self._rename(node, heir)
        for node in reversed(nodes):
            whole = node.args[0] if node.target is operator.getitem else None
            self.graph.erase_node(node)
            if isinstance(whole, Node):
                # a BatchNorm gives more than its result, which nobody reads of one that may go
                for part in list(whole.users):
                    self.graph.erase_node(part)
                self.graph.erase_node(whole)
        return {name for name in stored if name} | self._drop_unread_constants(nodes)

    def add_behind(self, node: Node, parameter: Node) -> None:
        """Add a parameter to what a node computes, for every reader of it, the outputs too."""
        self.call_behind(node, torch.ops.aten.add.Tensor, (parameter,))

    def call_behind(self, node: Node, operator: Any, arguments: tuple[Any, ...]) -> None:
        """An operator takes what a node computes first, then `arguments`; every reader reads its result."""
        with self.graph.inserting_after(node):
            added = self.graph.call_function(operator, (node, *arguments))
        added.meta.update(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        self._rename(node, added)

    def take_out_run(self, nodes: Sequence[Node], source: Node) -> set[str]:
        """Nodes in a row go: whoever read the last one now reads `source`.

        What only they read goes with them; returned are the stored tensors among it.
        """
        self.replace(nodes[-1], source)
        for node in reversed(nodes[:-1]):
            self.graph.erase_node(node)
        return self._drop_unread_constants(nodes)

    def rewrite_as_mul_add(
        self, nodes: Sequence[Node], source: Node, name: str, scale: Tensor, shift: Tensor
    ) -> set[str]:
        """Elementwise nodes in a row become one product and one sum with new constants."""
        factor = self.add_constant(self.free_name(f"{name}_scale"), scale, source)
        summand = self.add_constant(self.free_name(f"{name}_shift"), shift, source)
        with self.graph.inserting_after(nodes[-1]):
            product = self.graph.call_function(torch.ops.aten.mul.Tensor, (source, factor))
        with self.graph.inserting_after(product):
            added = self.graph.call_function(torch.ops.aten.add.Tensor, (product, summand))
        for made in (product, added):
            made.meta.update(nodes[-1].meta)
        return self.take_out_run(nodes, added)

    def _drop_unread_constants(self, nodes: Iterable[Node]) -> set[str]:
        """Drop the nodes that only removed ones read; returned are the stored tensors they came from."""
        names: set[str] = set()
        waiting = [operand for node in nodes for operand in self._operands.get(node.name, ())]
        while waiting:
            node = waiting.pop()
            if node.op == "placeholder":
                names.add(str(self._target_of(node)))
            elif not node._erased and not node.users and not node.is_impure():
                waiting += node.all_input_nodes
                self.graph.erase_node(node)
        return names

    def _rename(self, node: Node, other: Node) -> None:
        self.signature.replace_all_uses(node.name, other.name)
        for entry in self.calls:
            if entry.signature is not None:
                for argument in (*entry.signature.inputs, *entry.signature.outputs):
                    if getattr(argument, "name", None) == node.name:
                        argument.name = other.name

    def drop_unread(self, names: Iterable[str]) -> None:
        """Take away stored tensors, of these, that nothing reads any more."""
        gone = set(names)
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and not n.users]:
            spec = next(s for s in self.signature.input_specs if _name(s) == node.name)
            if spec.target not in gone or spec.kind == InputKind.USER_INPUT:
                continue
            self.signature.input_specs.remove(spec)
            self.graph.erase_node(node)
            if all(other.target != spec.target for other in self.signature.input_specs):
                self.state.pop(spec.target, None)
                self.constants.pop(spec.target, None)


def _name(spec: InputSpec) -> str:
    return str(getattr(spec.arg, "name", ""))


def _detached(tensors: dict[str, Any]) -> dict[int, Any]:
    """What a deep copy must not try: tensors that autograd made, which refuse to be copied."""
    memo: dict[int, Any] = {}
    for store in tensors.values():
        for held in store.values():
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    return memo
