"""Modules of any class whose forward is a BatchNorm in eval mode: told by what they compute.

A copy of torchvision's `FrozenBatchNorm2d` is one under any name of its class and of its tensors: s·x + t
with a factor and a summand for each channel that rest on tensors of the model, in any order, as arithmetic or
as a call of `batch_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bntool.graph.affine import batch_norm_affine
from bntool.graph.dataflow import WRITTEN_OUT, Graph, Module, Op
from bntool.observe.decomposed_norms import TakenApart, norms_taken_apart
from bntool.observe.own_maps import OwnMap, own_map

_SLOTS = ("weight", "bias", "running_mean", "running_var")
_ROOTS = frozenset("sqrt rsqrt pow".split())
_ROUNDINGS = 16 * torch.finfo(torch.float64).eps
"""Two orders of the same arithmetic in float64 round some ten times each."""


def recognise_norms(graph: Graph) -> None:
    """Let one `batch_norm` stand for what each such module does.

    What takes a root of stored tensors, and is not known otherwise, gets a verdict and stays: a module the
    role `custom_norm`, arithmetic between layers a name of its own.
    """
    for module in list(graph.modules.values()):
        if module.role not in ("", "custom_norm") or not module.calls or len(module.whole) != module.calls:
            continue
        if _is_one_norm(graph, module):
            module.role = "norm" if not module.children else "norm_act"
        else:
            calls = [_Call(graph, module, number) for number in range(module.calls)]
            if all(call.found is not None for call in calls) and _agree(calls):
                module.role = "norm"
                for call in calls:
                    call.put_together()
    for found in norms_taken_apart(graph, lambda op: op.kind != "absorbed"):
        if any(_takes_a_root(graph, op) for op in found.ops):
            _give_a_verdict(graph, found)


def _is_one_norm(graph: Graph, module: Module) -> bool:
    """Whether every call was one batch normalisation of its input by the module's own tensors; behind it
    may come what its children `drop` and `act` do, which remain when it goes.
    """
    behind = [graph.modules.get(f"{module.name}.{child}".lstrip(".")) for child in module.children]
    if not set(module.children) <= {"drop", "act"} or None in behind:
        return False
    for call, (ran, given, made) in enumerate(zip(module.whole, module.inputs, module.outputs, strict=True)):
        op = graph.ops[ran[0]] if ran else None
        if op is None or op.kind != "batch_norm" or op.inputs["input"] != given:
            return False
        last: int | None = op.outputs[0]
        rest = ran[1:]
        for child in behind:
            if child is None or child.calls != module.calls or child.inputs[call] != last:
                return False
            inside = child.whole[call]
            if rest[: len(inside)] != inside or child.outputs[call] is None:
                return False
            last, rest = child.outputs[call], rest[len(inside) :]
        if rest or last != made:
            return False
        if op.attrs["training"] or "running_mean" not in op.inputs:
            return False
        own = {slot: f"{module.name}.{slot}".lstrip(".") for slot in _SLOTS}
        if any(graph.input(op, slot).handle != own[slot] for slot in _SLOTS if slot in op.inputs):
            return False
    return True


class _Call:
    """One run of a module: its ops, and the map where they are one that nothing else reads from."""

    def __init__(self, graph: Graph, module: Module, number: int) -> None:
        self.graph, self.module = graph, module
        self.ops = [graph.ops[i] for i in module.whole[number]]
        self.given, self.made = module.inputs[number], module.outputs[number]
        self.found: OwnMap | None = None
        if self.given is not None and self.made is not None and self._is_private():
            found = own_map(graph, self.ops, self.given, self.made)
            self.found = found if found is not None and not self._holds_the_norm(found) else None

    def _is_private(self) -> bool:
        inside = {op.id for op in self.ops}
        made = (self.graph.values[v] for op in self.ops for v in op.outputs if v != self.made)
        own = (value for value in made if not value.is_output)
        return bool(self.ops) and all(reader in inside for value in own for reader, _ in value.readers)

    def _holds_the_norm(self, found: OwnMap) -> bool:
        """Whether it is a layer inside that does it, and has the tensors."""
        inside = f"{self.module.name}." if self.module.name else ""
        owners = (self.graph.values[v].handle.rpartition(".")[0] for v in found.stored)
        return any(owner != self.module.name and owner.startswith(inside) for owner in owners)

    def put_together(self) -> None:
        """One `batch_norm` in place of the last op; the others read and make nothing any more."""
        assert self.found is not None and self.made is not None and self.given is not None
        stored = {self.graph.values[v].handle: v for v in self.found.stored}
        eps = self._epsilon(stored)
        for op in self.ops:
            for role, value in op.inputs.items():
                self.graph.values[value].readers.remove((op.id, role))
            for value in op.outputs:
                self.graph.values[value].producer = None
            op.inputs, op.attrs, op.outputs, op.views, op.kind = {}, {}, (), (), "absorbed"
        last = self.ops[-1]
        last.kind, last.scope, last.outputs = "batch_norm", self.module.name, (self.made,)
        self.graph.values[self.made].producer = last.id
        last.attrs = {"eps": eps or 0.0, "training": False, "axis": self.found.axis, "frozen": True}
        last.inputs = {"input": self.given}
        if eps is None:
            last.attrs["map"] = self.found.affine
            last.inputs |= {f"stored_{i}": value for i, value in enumerate(self.found.stored)}
        else:
            last.inputs |= {slot: stored[self._own(slot)] for slot in _SLOTS}
        last.inplace = False
        for role, value in last.inputs.items():
            self.graph.values[value].readers.append((last.id, role))

    def _own(self, slot: str) -> str:
        return f"{self.module.name}.{slot}".lstrip(".")

    def _epsilon(self, stored: dict[str, int]) -> float | None:
        """ε where the map is the one that four tensors make which are named as a BatchNorm names its own."""
        assert self.found is not None
        if stored.keys() != {self._own(slot) for slot in _SLOTS}:
            return None
        weight, bias, mean, variance = (self.graph.tensors[self._own(slot)] for slot in _SLOTS)
        if any(
            t.shape != mean.shape or not t.is_floating_point() or t.dim() != 1
            for t in (weight, bias, variance)
        ):
            return None
        numbers = [op.attrs.get("number") for op in self.ops if op.kind == "add"]
        numbers += [op.attrs.get("eps") for op in self.ops if op.kind == "batch_norm"]
        for eps in [*(float(n) for n in numbers if n is not None), 0.0]:
            if self._is_norm_of(weight, bias, mean, variance, eps):
                return eps
        return None

    def _is_norm_of(self, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> bool:
        assert self.found is not None
        scale, shift = batch_norm_affine(weight, bias, mean, variance, eps)
        size = bias.detach().double().abs().cpu() + (scale * mean.detach().double().cpu()).abs()
        own = self.found.affine
        return bool(((scale - own.scale).abs() <= _ROUNDINGS * scale.abs()).all()) and bool(
            ((shift - own.shift).abs() <= _ROUNDINGS * size).all()
        )


def _agree(calls: list[_Call]) -> bool:
    """Whether every call is the same map of the same tensors: a bank may choose others each time."""
    keys = {(call.found.affine.expr, call.found.axis) for call in calls if call.found is not None}
    return len(keys) == 1


def _takes_a_root(graph: Graph, op: Op) -> bool:
    """Whether a constant that the op reads is made with a root of a stored tensor."""
    waiting = [value for value in op.inputs.values() if graph.values[value].constant]
    rooted = False
    while waiting:
        value = graph.values[waiting.pop()]
        maker = graph.producer(value)
        if maker is None:
            if rooted and value.handle:
                return True
            continue
        rooted |= maker.kind in _ROOTS
        waiting += maker.inputs.values()
    return False


def _give_a_verdict(graph: Graph, found: TakenApart) -> None:
    scope = found.ops[-1].scope
    module = graph.modules.get(scope)
    if module is not None and not module.role and not module.children and module.own_tensors > 1:
        module.role = "custom_norm"
    elif module is None or module.role in ("", "sequential"):
        name = first = f"{scope}.batch_norm" if scope else "batch_norm"
        number = 0
        while name in graph.modules:
            number += 1
            name = f"{first}_{number}"
        graph.modules[name] = Module(name, WRITTEN_OUT, role="custom_norm", calls=1)
