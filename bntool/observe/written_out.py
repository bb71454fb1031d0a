"""Modules of any class whose forward is the arithmetic of a frozen BatchNorm: told by what they compute.

A copy of torchvision's `FrozenBatchNorm2d` is one under any name of its class: (x − μ)/√(σ²+ε)·γ + β, in any
order, of its own `weight`, `bias`, `running_mean` and `running_var`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bntool.graph.affine import batch_norm_affine
from bntool.graph.dataflow import Graph, Module, Op
from bntool.observe.taken_apart import TakenApart, norms_taken_apart

_SLOTS = ("weight", "bias", "running_mean", "running_var")
_ROOTS = frozenset("sqrt rsqrt pow".split())
_ROUNDINGS = 16
"""The forward rounds some ten times on its way to a factor and a summand."""


def recognise_norms(graph: Graph) -> None:
    """Let one `batch_norm` stand for the arithmetic of each such module.

    One that takes a root and is not known otherwise gets the role `custom_norm`: a verdict, and no fold. A
    class of one's own whose forward is one `batch_norm` with its own tensors is a BatchNorm too.
    """
    for module in graph.modules.values():
        if module.role in ("", "custom_norm") and _is_one_norm(graph, module):
            module.role = "norm"
        if module.role or module.children or not module.calls or module.own_tensors < 2:
            continue
        calls = [_Call(graph, module, number) for number in range(len(module.whole))]
        if len(calls) != module.calls or any(call.run is None or not call.roots for call in calls):
            continue
        known = [call.is_batch_norm() for call in calls]
        module.role = "norm" if all(known) else "custom_norm"
        if all(known):
            for call in calls:
                call.put_together()


def _is_one_norm(graph: Graph, module: Module) -> bool:
    """Whether every call was one batch normalisation of its input by the module's own tensors."""
    if module.children or not module.calls or len(module.whole) != module.calls:
        return False
    for ran, given, made in zip(module.whole, module.inputs, module.outputs, strict=True):
        op = graph.ops[ran[0]] if len(ran) == 1 else None
        if op is None or op.kind != "batch_norm" or (op.inputs["input"], op.outputs[0]) != (given, made):
            return False
        if op.attrs["training"] or "running_mean" not in op.inputs:
            return False
        own = {slot: f"{module.name}.{slot}".lstrip(".") for slot in _SLOTS}
        if any(graph.input(op, slot).handle != own[slot] for slot in _SLOTS if slot in op.inputs):
            return False
    return True


class _Call:
    """One run of a module: its ops on data, where they are one affine map, and those on constants."""

    def __init__(self, graph: Graph, module: Module, number: int) -> None:
        self.graph, self.module = graph, module
        ops = [graph.ops[i] for i in module.whole[number]]
        self.prepared = [op for op in ops if _is_constant(graph, op)]
        self.run = self._whole_run([op for op in ops if not _is_constant(graph, op)], number)
        self.roots = [op for op in self.prepared if op.kind in _ROOTS]
        self.eps = 0.0

    def _whole_run(self, ops: list[Op], number: int) -> TakenApart | None:
        """The affine map, where it is all that the module does from its input to its output."""
        ids = {op.id for op in ops}
        found = norms_taken_apart(self.graph, lambda op: op.id in ids, ops)
        if len(found) != 1 or {op.id for op in found[0].ops} != ids:
            return None
        (run,) = found
        ends = run.ops[0].inputs[run.role], run.ops[-1].outputs[0]
        inside = ids | {op.id for op in self.prepared}
        private = all(
            reader in inside
            for op in self.prepared
            for value in op.outputs
            for reader, _ in self.graph.values[value].readers
        )
        return run if private and ends == (self.module.inputs[number], self.module.outputs[number]) else None

    def is_batch_norm(self) -> bool:
        """Whether the map is the one that the module's own four tensors make, to rounding."""
        assert self.run is not None
        stored = self._stored()
        names = {f"{self.module.name}.{slot}".lstrip(".") for slot in _SLOTS}
        if stored.keys() != names:
            return False
        weight, bias, mean, variance = (self._tensor(slot) for slot in _SLOTS)
        if any(t.shape != mean.shape or not t.is_floating_point() for t in (weight, bias, variance)):
            return False
        for eps in self._summands():
            scale, shift = batch_norm_affine(weight, bias, mean, variance, eps)
            allowed = _ROUNDINGS * torch.finfo(mean.dtype).eps
            size = bias.detach().double().abs().cpu() + (scale * mean.detach().double().cpu()).abs()
            if bool(((scale - self.run.scale).abs() <= allowed * scale.abs()).all()) and bool(
                ((shift - self.run.shift).abs() <= allowed * size).all()
            ):
                self.eps = eps
                return True
        return False

    def _tensor(self, slot: str) -> Tensor:
        return self.graph.tensors[f"{self.module.name}.{slot}".lstrip(".")]

    def _stored(self) -> dict[str, int]:
        """The values of the stored tensors that the module reads, by handle."""
        assert self.run is not None
        read = (v for op in (*self.prepared, *self.run.ops) for v in op.inputs.values())
        return {self.graph.values[v].handle: v for v in read if self.graph.values[v].handle}

    def _summands(self) -> list[float]:
        """What may be ε: a number that is added to something constant; or none is."""
        numbers = [op.attrs.get("number") for op in self.prepared if op.kind == "add"]
        return [*(float(n) for n in numbers if n is not None), 0.0]

    def put_together(self) -> None:
        """One `batch_norm` in place of the last op; the others read and make nothing any more."""
        assert self.run is not None
        stored, source = self._stored(), self.run.ops[0].inputs[self.run.role]
        *before, last = self.run.ops
        for op in (*self.prepared, *before, last):
            for role, value in op.inputs.items():
                self.graph.values[value].readers.remove((op.id, role))
            op.inputs = {}
        for op in (*self.prepared, *before):
            for value in op.outputs:
                self.graph.values[value].producer = None
            op.kind, op.outputs, op.views = "absorbed", (), ()
        last.kind, last.scope, last.views = "batch_norm", self.module.name, ()
        last.attrs = {"eps": self.eps, "training": False, "axis": self.run.axis, "frozen": True}
        last.inputs = {"input": source}
        for slot in _SLOTS:
            last.inputs[slot] = stored[f"{self.module.name}.{slot}".lstrip(".")]
        for role, value in last.inputs.items():
            self.graph.values[value].readers.append((last.id, role))


def _is_constant(graph: Graph, op: Op) -> bool:
    return all(graph.values[value].constant for value in op.outputs)
