"""Apply a fold plan to an `ExportedProgram`: a copy with new numbers in it and without the BatchNorms."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from bntool.affine import Pair, batch_norm_affine, evaluate
from bntool.errors import InvariantError
from bntool.graph import Op
from bntool.observe.exported_program import ProgramObservation
from bntool.observe.program_nodes import arguments_of, operator_of
from bntool.plan import Edit, Merge, Plan, Window
from bntool.surgery.merging import cast_like, merged
from bntool.surgery.program_graph import ProgramCopy
from bntool.surgery.tensors import edited, edited_norm

_PRODUCTS = frozenset({"mm", "matmul"})
"""Operators without a place for a bias."""


def apply_fold_program(observed: ProgramObservation, plan: Plan) -> ExportedProgram:
    """A copy of the observed program with every site of a fold plan carried out.

    Arithmetic is float64 with one cast to the stored type. Tensors that only a removed BatchNorm read go; a
    bias that was not there becomes a parameter, and so does the clone of a shared tensor. The argument is not
    changed, and the copy shares no tensor with it.
    """
    copied = ProgramCopy(observed.program)
    with torch.no_grad():
        work = _FoldWork(observed, copied, plan.merges)
        for site in plan.fold_sites:
            for edit in site.edits:
                work.carry_out(edit)
        work.write()
    return copied.finish()


def in_float64(program: ExportedProgram) -> ExportedProgram:
    """A copy of a program that holds and declares all its tensors in float64."""
    copied = ProgramCopy(program)
    copied.widen()
    return copied.finish()


class _FoldWork:
    def __init__(self, observed: ProgramObservation, copied: ProgramCopy, merges: tuple[Merge, ...]) -> None:
        self.observed, self.copied, self.merges = observed, copied, merges
        self.merging = {h for merge in merges for b in merge.branches for h in (b.weight, b.bias) if h}
        self.tensors: dict[str, Tensor] = {}
        self.made_for: dict[str, Edit | Merge] = {}
        self.made_affine: dict[str, tuple[str, str]] = {}
        self.names = dict(observed.names)
        self.calls = {layer: list(labels) for layer, labels in observed.layers.items()}
        self.places = {op.place: op for op in observed.graph.ops if op.place}
        self.removed: list[str] = []
        self.norms: dict[str, Op] = {}
        for op in observed.graph.of_kind("batch_norm"):
            self.norms.setdefault(op.scope, op)

    def carry_out(self, edit: Edit) -> None:
        if edit.kind == "remove":
            self.removed.append(edit.layer)
            return
        if edit.kind == "unshare":
            self._unshare(edit)
            return
        assert edit.map is not None
        pair = evaluate(edit.map, self._leaf)
        weight = self._tensor(edit.weight)
        bias = self._tensor(edit.bias) if edit.bias else None
        if edit.layout == "norm":
            _, _, mean, variance = self._norm_tensors(edit.layer)
            assert mean is not None and variance is not None
            new = edited_norm(edit, weight, bias, mean, variance, self._eps(edit.layer), pair)
            self.tensors[edit.weight], self.tensors[edit.bias] = new
            roles = {"weight": edit.weight, "bias": edit.bias}
            missing = roles.keys() - self.norms[edit.layer].inputs.keys()
            self.made_affine |= {roles[role]: (edit.layer, role) for role in missing}
            return
        if weight is None:
            raise InvariantError(f"the plan edits {edit.weight}, which the program does not have")
        if edit.bias and edit.bias not in self.names:
            self.made_for[edit.bias] = edit
        self.tensors[edit.weight], new_bias = edited(edit, weight, bias, pair)
        if new_bias is not None and edit.bias:
            self.tensors[edit.bias] = new_bias

    # -- sharing ----------------------------------------------------------------------------------------

    def _unshare(self, edit: Edit) -> None:
        """One call leaves the others of its layer, with clones of the tensors that it shares."""
        op = self.places[edit.layer]
        label = edit.layer.removeprefix(f"{op.scope}@")
        self.calls[op.scope].remove(label)
        self.calls[edit.layer] = [label]
        for role, new in (("weight", edit.weight), ("bias", edit.bias)):
            if new and role in op.inputs:
                self._clone(self.copied.nodes[label], self.observed.graph.input(op, role).handle, new)
            elif new and (made := f"{op.scope}.bias") in self.tensors:
                # a bias that an earlier edit has asked for
                self.tensors[new] = self.tensors[made]
                self.made_for[new] = dataclasses.replace(
                    self.made_for[made], layer=edit.layer, weight=edit.weight
                )

    def _clone(self, call: Node, handle: str, new: str) -> None:
        name = self.copied.give_own(call, self.names[handle])
        self.names[handle] = tuple(known for known in self.names[handle] if known != name)
        self.names[new] = (name,)
        if handle in self.tensors:
            self.tensors[new] = self.tensors[handle]

    # -- numbers ----------------------------------------------------------------------------------------

    def _leaf(self, kind: str, name: str) -> Any:
        if kind == "tensor":
            return self._tensor(name)
        gamma, beta, mean, variance = self._norm_tensors(name)
        assert mean is not None and variance is not None
        pair: Pair = batch_norm_affine(gamma, beta, mean, variance, self._eps(name))
        return pair

    def _norm_tensors(self, name: str) -> list[Tensor | None]:
        op, graph = self.norms[name], self.observed.graph
        roles = ("weight", "bias", "running_mean", "running_var")
        made = {role: handle for handle, (norm, role) in self.made_affine.items() if norm == name}
        handles = {role: graph.input(op, role).handle for role in roles if role in op.inputs} | made
        return [self._tensor(handles[role]) if role in handles else None for role in roles]

    def _eps(self, name: str) -> float:
        return float(self.norms[name].attrs["eps"])

    def _tensor(self, handle: str) -> Tensor | None:
        """A tensor as the edits so far have left it."""
        if handle in self.tensors:
            return self.tensors[handle]
        names = self.names.get(handle)
        if not names:
            return self.observed.graph.tensors.get(handle)
        stored = self.copied.tensor(names[0]).detach()
        # what is yet to be merged is rounded only then
        return stored.double() if handle in self.merging else stored

    # -- writing ----------------------------------------------------------------------------------------

    def write(self) -> None:
        self._merge_numbers()
        for handle, tensor in self.tensors.items():
            names = self.names.get(handle)
            if names:
                self.copied.set_tensor(names, tensor)
            elif handle in self.made_for:
                self._create_bias(self.made_for[handle], tensor)
            elif handle in self.made_affine:
                self._create_affine(handle, *self.made_affine[handle], tensor)
        dropped: set[str] = set()
        for name in self.removed:
            if name in self.observed.apart:
                dropped |= self.copied.take_out_run(*self._run(name))
                continue
            for label in self.observed.norms[name]:
                self._take_out(self.copied.nodes[label])
            dropped |= self._names_of_norm(name)
        going = {*self.removed, *(name for merge in self.merges for name in merge.norms)}
        for name in self.observed.apart.keys() - going:
            dropped |= self._rewrite(name)
        for merge in self.merges:
            dropped |= self._merge_nodes(merge)
        self.copied.drop_unread(dropped)

    def _merge_numbers(self) -> None:
        made = {merge: merged(merge, self._tensor, self._leaf) for merge in self.merges}
        for handle in self.merging & self.tensors.keys():
            del self.tensors[handle]
        for merge, (weight, bias) in made.items():
            stored = self.copied.tensor(self.observed.names[merge.weight][0])
            self.tensors[merge.weight] = cast_like(weight, stored)
            if bias is not None:
                self.tensors[merge.bias] = cast_like(bias, stored)
                if merge.bias not in self.observed.names:
                    self.made_for[merge.bias] = merge

    def _merge_nodes(self, merge: Merge) -> set[str]:
        """One convolution in the place of parallel branches; the stored tensors that went with them."""
        (label,) = self.observed.layers[merge.layer]
        call = self.copied.nodes[label]
        weight = self.tensors[merge.weight]
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
        if not any(handle in self.tensors for handle in handles):
            return set()
        nodes, source = self._run(name)
        shape = [1] * len(graph.input(op).shape)
        shape[self.observed.apart[name].axis] = -1
        dtype = source.meta["val"].dtype
        tensors = [self._tensor(handle) for handle in handles]
        scale, shift = (tensor.to(dtype).reshape(shape) for tensor in tensors if tensor is not None)
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

    def _create_bias(self, edit: Edit | Merge, bias: Tensor) -> None:
        """A bias that was not there, for every call of the layer."""
        weight = self.names[edit.weight][0]
        stem = weight.removesuffix("weight")
        name = self.copied.free_name(f"{stem}bias" if stem != weight else f"{weight}_bias")
        parameter = self.copied.add_parameter(name, bias, weight)
        for label in self.calls[edit.layer]:
            self._give_bias(self.copied.nodes[label], parameter)

    def _create_affine(self, handle: str, norm: str, role: str, tensor: Tensor) -> None:
        """A γ or β that was not there, for the one call of a BatchNorm that stays."""
        mean = self.names[self.observed.graph.input(self.norms[norm], "running_mean").handle][0]
        parameter = self.copied.add_parameter(self.copied.free_name(handle), tensor, mean)
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
