"""Apply a fold plan to an `ExportedProgram`: a copy with new numbers in it and without the BatchNorms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from bntool.core.errors import InvariantError
from bntool.core.plan import Plan
from bntool.core.sites import Branch, Edit, Merge, Window
from bntool.graph.dataflow import Op
from bntool.observe.exported_program import ProgramObservation
from bntool.observe.program_nodes import arguments_of, operator_of
from bntool.surgery.editing import ROLES, Role, Slot, StoredNorm, apply_edits, removed_norms
from bntool.surgery.program_graph import ProgramCopy

_PRODUCTS = frozenset({"mm", "matmul"})
"""Operators without a place for a bias."""


def apply_fold_program(observed: ProgramObservation, plan: Plan) -> ExportedProgram:
    """A copy of the observed program with every site of a fold plan carried out.

    Arithmetic is float64 with one cast to the stored type. Tensors that only a removed BatchNorm read go; a
    bias that was not there becomes a parameter, and so does the clone of a shared tensor. The argument is not
    changed, and the copy shares no tensor with it.
    """
    tensors = _ProgramTensors(observed)
    apply_edits(tensors, plan)
    tensors.rewire(plan)
    return tensors.copied.finish()


def in_float64(program: ExportedProgram) -> ExportedProgram:
    """A copy of a program that holds and declares all its tensors in float64."""
    copied = ProgramCopy(program)
    copied.widen()
    return copied.finish()


class _ProgramTensors:
    """The tensors of a copy of a program, told by their handles in the graph."""

    def __init__(self, observed: ProgramObservation) -> None:
        self.observed, self.copied = observed, ProgramCopy(observed.program)
        self.new: dict[str, Tensor] = {}
        self.made_for: dict[str, Edit | Branch | Merge] = {}
        self.names = dict(observed.names)
        self.calls = {layer: list(labels) for layer, labels in observed.layers.items()}
        self.places = {op.place: op for op in observed.graph.ops if op.place}
        self.norms: dict[str, Op] = {}
        for op in observed.graph.of_kind("batch_norm"):
            self.norms.setdefault(op.scope, op)

    def slot(self, part: Edit | Branch | Merge, role: Role) -> str:
        if role == "weight":
            return part.weight
        if part.bias not in self.names:
            self.made_for.setdefault(part.bias, part)
        return part.bias

    def norm(self, name: str) -> StoredNorm:
        op, graph = self.norms[name], self.observed.graph
        # what a BatchNorm without γ would get is told by no name: there may be a tensor that it does not use
        gamma, beta = (graph.input(op, r).handle if r in op.inputs else (name, r) for r in ROLES)
        mean, variance = (self.constant(graph.input(op, r).handle) for r in ("running_mean", "running_var"))
        return StoredNorm(gamma, beta, mean, variance, float(op.attrs["eps"]))

    def constant(self, handle: str) -> Tensor:
        found = self.stored(handle)
        if found is None:
            raise InvariantError(f"the plan names {handle}, which the program does not have")
        return found

    def stored(self, slot: Slot) -> Tensor | None:
        if not isinstance(slot, str):
            return None
        names = self.names.get(slot)
        return self.copied.tensor(names[0]).detach() if names else self.observed.graph.tensors.get(slot)

    def like(self, slot: Slot) -> Tensor:
        if isinstance(slot, tuple):
            return self.norm(slot[0]).mean
        handle = str(slot)
        return self.constant(self.made_for[handle].weight if handle in self.made_for else handle)

    def put(self, slot: Slot, tensor: Tensor) -> None:
        if isinstance(slot, tuple):
            norm, role = slot
            self._create_affine(norm, role, tensor)
            return
        handle = str(slot)
        self.new[handle] = tensor
        if names := self.names.get(handle):
            self.copied.set_tensor(names, tensor)
        elif handle in self.made_for:
            self._create_bias(self.made_for[handle], tensor)

    def unshare(self, edit: Edit) -> Iterator[tuple[Slot, Slot]]:
        """One call leaves the others of its layer, with clones of the tensors that it shares."""
        op = self.places[edit.layer]
        label = edit.layer.removeprefix(f"{op.scope}@")
        self.calls[op.scope].remove(label)
        self.calls[edit.layer] = [label]
        for role, new in (("weight", edit.weight), ("bias", edit.bias)):
            made = f"{op.scope}.bias"
            if new and role in op.inputs:
                old = self.observed.graph.input(op, role).handle
                name = self.copied.give_own(self.copied.nodes[label], self.names[old])
                self.names[old] = tuple(known for known in self.names[old] if known != name)
                self.names[new] = (name,)
                yield old, new
            elif new and made in self.made_for:
                # a bias that an earlier edit has asked for
                self.made_for[new] = edit
                yield made, new

    # -- nodes ------------------------------------------------------------------------------------------

    def rewire(self, plan: Plan) -> None:
        """Take out the BatchNorms that go, and the branches that are merged, with what only they read."""
        dropped: set[str] = set()
        removed = removed_norms(plan)
        for name in removed:
            if name in self.observed.apart:
                dropped |= self.copied.take_out_run(*self._run(name))
                continue
            for label in self.observed.norms[name]:
                self._take_out(self.copied.nodes[label])
            dropped |= self._names_of_norm(name)
        going = {*removed, *(name for merge in plan.merges for name in merge.norms)}
        for name in (name for name in self.observed.apart if name not in going):
            dropped |= self._rewrite(name)
        for merge in plan.merges:
            dropped |= self._merge_nodes(merge)
        self.copied.drop_unread(dropped)

    def _merge_nodes(self, merge: Merge) -> set[str]:
        """One convolution in the place of parallel branches; the stored tensors that went with them."""
        (label,) = self.observed.layers[merge.layer]
        call = self.copied.nodes[label]
        weight = self.new[merge.weight]
        if any(b.weight == merge.weight and b.window != merge.window for b in merge.branches):
            self._set_window(call, merge.window, weight)
        apart = [self.observed.norms[name] for name in merge.norms if name in self.observed.apart]
        runs = {run[-1]: run for run in apart}
        nodes = [self.copied.nodes[name] for value in merge.values for name in runs.get(value, (value,))]
        names = self.copied.hand_over(nodes, call)
        return names.union(*(self._names_of_norm(n) for n in merge.norms if n not in self.observed.apart))

    def _set_window(self, call: Node, window: Window, weight: Tensor) -> None:
        """Other arguments for a convolution, all of them by position, and the new shape of its weight."""
        bound = arguments_of(call)
        bound.update(padding=list(window.before), dilation=list(window.dilation), groups=window.groups)
        if isinstance(call.target, torch._ops.OpOverload) and call.target._overloadname == "padding":
            call.target = call.target.overloadpacket.default
        assert isinstance(call.target, torch._ops.OpOverload)
        arguments = call.target._schema.arguments
        call.args = tuple(bound.get(argument.name, argument.default_value) for argument in arguments)
        call.kwargs = {}
        bound["weight"].meta["val"] = bound["weight"].meta["val"].new_empty(tuple(weight.shape))

    def _run(self, name: str) -> tuple[list[Node], Node]:
        """The nodes of a BatchNorm in elementary operators, and the data that the first one reads."""
        nodes = [self.copied.nodes[label] for label in self.observed.norms[name]]
        bound = arguments_of(nodes[0])
        role = self.observed.apart[name].role
        source = bound["self" if role == "input" and "self" in bound else role]
        assert isinstance(source, Node)
        return nodes, source

    def _rewrite(self, name: str) -> set[str]:
        """New numbers for a BatchNorm in elementary operators that stays: one product and one sum."""
        op, graph = self.norms[name], self.observed.graph
        handles = [graph.input(op, slot).handle for slot in ("weight", "bias")]
        if not any(handle in self.new for handle in handles):
            return set()
        nodes, source = self._run(name)
        shape = [1] * len(graph.input(op).shape)
        shape[self.observed.apart[name].axis] = -1
        dtype = source.meta["val"].dtype
        scale, shift = (self.new[handle].to(dtype).reshape(shape) for handle in handles)
        return self.copied.rewrite_as_mul_add(nodes, source, name, scale, shift)

    def _names_of_norm(self, name: str) -> set[str]:
        """The stored tensors that a BatchNorm brought, its count of batches among them."""
        graph, op = self.observed.graph, self.norms[name]
        names: set[str] = set()
        for role in ("weight", "bias", "running_mean", "running_var"):
            if role in op.inputs:
                names.update(self.observed.names[graph.input(op, role).handle])
        stems = (name.removesuffix("running_mean") for name in names if name.endswith("running_mean"))
        return names | {f"{stem}num_batches_tracked" for stem in stems}

    def _take_out(self, node: Node) -> None:
        source = arguments_of(node)["input"]
        assert isinstance(source, Node)
        if not isinstance(node.meta.get("val"), tuple | list):
            self.copied.replace(node, source)
            return
        for part in list(node.users):
            if part.args[1] == 0:
                self.copied.replace(part, source)
            else:
                self.copied.graph.erase_node(part)
        self.copied.graph.erase_node(node)

    def _create_bias(self, part: Edit | Branch | Merge, bias: Tensor) -> None:
        """A bias that was not there, for every call of the layer."""
        weight = self.names[part.weight][0]
        stem = weight.removesuffix("weight")
        name = self.copied.free_name(f"{stem}bias" if stem != weight else f"{weight}_bias")
        parameter = self.copied.add_parameter(name, bias, weight)
        for label in self.calls[part.layer]:
            self._give_bias(self.copied.nodes[label], parameter)

    def _create_affine(self, norm: str, role: Role, tensor: Tensor) -> None:
        """A γ or β that was not there, for the one call of a BatchNorm that stays."""
        mean = self.names[self.observed.graph.input(self.norms[norm], "running_mean").handle][0]
        name = self.copied.free_name(f"{norm}.{role}".lstrip("."))
        parameter = self.copied.add_parameter(name, tensor, mean)
        (label,) = self.observed.norms[norm]
        _set_argument(self.copied.nodes[label], role, parameter)

    def _give_bias(self, call: Node, parameter: Node) -> None:
        if operator_of(call) in _PRODUCTS:
            self.copied.add_behind(call, parameter)
        else:
            _set_argument(call, "bias", parameter)


def _set_argument(call: Node, name: str, parameter: Node) -> None:
    assert isinstance(call.target, torch._ops.OpOverload)
    place = [argument.name for argument in call.target._schema.arguments].index(name)
    given = [*call.args, *([None] * (place + 1 - len(call.args)))]
    given[place] = parameter
    call.args = tuple(given)
    call.kwargs = {key: value for key, value in call.kwargs.items() if key != name}
