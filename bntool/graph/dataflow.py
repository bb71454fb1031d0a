"""The neutral dataflow graph: what a front end saw, in words that no front end owns.

Ops are kept in the order they ran, so an op's id is larger than the ids of everything it reads from.
Weights are named by handle (qualified name); an op's `kind` is bntool's own word (`conv`, `reshape`, …).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

READS_NUMBERS = "forward reads numbers from its data: only the branches that the example input took were seen"
"""What a plan says where `Graph.reads_numbers`."""

WRITTEN_OUT = "BatchNorm in elementary operators"
"""The kind of a BatchNorm that is arithmetic of its own, of no module."""

Edge = tuple[int, str]
"""One reading of a value: (id of the op that reads it, the role it plays there)."""


@dataclasses.dataclass(slots=True)
class Value:
    """One tensor at one moment (an in-place op makes a new value).

    `handle` is the qualified name of a parameter or buffer. `constant` means it does not depend on
    the model's input. `watched` names the hooked modules that see it, `through` the modules that
    handed it on unchanged. `escapes` means it was still alive after the forward, yet no output. `name` is
    what a front end's own graph calls it.
    """

    id: int
    shape: tuple[int, ...]
    producer: int | None = None
    handle: str = ""
    constant: bool = False
    readers: list[Edge] = dataclasses.field(default_factory=list)
    is_output: bool = False
    escapes: bool = False
    watched: list[str] = dataclasses.field(default_factory=list)
    through: list[str] = dataclasses.field(default_factory=list)
    dtype: str = ""
    name: str = ""


@dataclasses.dataclass(slots=True)
class Op:
    """One operation that ran. `inputs` maps roles to value ids; `scope` is the innermost module.

    `out` (and `out_1`, …) is what an op was given to write its results to, and does not read.
    `views` are the roles of the inputs whose memory an output was seen to share.
    `place` tells apart the call sites of one scope that can each be given tensors of their own: the other
    names of a module that has several, or the node of a graph. Empty where that is the scope itself.
    """

    id: int
    kind: str
    inputs: dict[str, int]
    outputs: tuple[int, ...]
    attrs: dict[str, Any]
    scope: str = ""
    call: int = 0
    inplace: bool = False
    views: tuple[str, ...] = ()
    place: str = ""

    @property
    def reads(self) -> list[str]:
        """The roles of the inputs whose numbers it reads."""
        return [role for role in self.inputs if not is_out(role)]

    @property
    def writes(self) -> list[str]:
        """The roles of the inputs that an in-place op writes to."""
        return [role for role in self.inputs if is_out(role)] or [r for r in self.inputs if r == "input"]

    @property
    def label(self) -> str:
        """How reports name this op: its module, or its kind where it belongs to the root."""
        return f"{self.kind} in {self.scope}" if self.scope else self.kind


def is_out(role: str) -> bool:
    """Whether an input is only written to: `torch.add(a, b, out=c)`."""
    return role == "out" or role.startswith("out_")


@dataclasses.dataclass(slots=True)
class Module:
    """What a front end knows of one module: its class, its calls, and what ran inside.

    `role` is what planners need to know of the class: `conv`, `linear`, `norm` (a BatchNorm whose
    forward is known), `norm_act` (one that applies its own activation too), `custom_norm` (one whose
    forward is not known), `identity`, `sequential`, `scripted`, or empty. `plain_bias` says that the
    layer's forward uses `self.bias`, so that a missing bias may be created. `from_outside` says that the
    layer was called through what no copy of the model has a copy of, such as a closure. `whole` lists,
    call by call, the ids of all ops that ran inside, children included.
    """

    name: str
    kind: str
    role: str = ""
    children: tuple[str, ...] = ()
    own_tensors: int = 0
    plain_bias: bool = False
    calls: int = 0
    hooked: bool = False
    left_in_train: bool = False
    from_outside: bool = False
    whole: list[list[int]] = dataclasses.field(default_factory=list)
    inputs: list[int | None] = dataclasses.field(default_factory=list)
    outputs: list[int | None] = dataclasses.field(default_factory=list)


class Graph:
    """Ops, values and modules of one forward, and the tensors behind the handles.

    `rewirable` says that every reading of a stored tensor is an edge of its own, as in an ONNX graph; else a
    tensor is read through the attribute of a module. `reads_sizes` says that Python code asked a tensor how
    long it is, or may have.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.modules: dict[str, Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, list[str]] = {}
        self.constants: dict[int, Tensor] = {}
        self.model_class = ""
        self.reads_numbers = False
        self.reads_sizes = False
        self.rewirable = False

    def add_value(self, shape: tuple[int, ...], **fields: Any) -> Value:
        value = Value(len(self.values), shape, **fields)
        self.values.append(value)
        return value

    def add_op(self, kind: str, inputs: dict[str, int], outputs: tuple[int, ...], **fields: Any) -> Op:
        op = Op(len(self.ops), kind, inputs, outputs, **fields)
        self.ops.append(op)
        for role, value in inputs.items():
            self.values[value].readers.append((op.id, role))
        for value in outputs:
            self.values[value].producer = op.id
        return op

    def drop_ops_from(self, start: int) -> None:
        """Forget the ops from id `start` on, as if they had never read anything."""
        for op in self.ops[start:]:
            for value in op.inputs.values():
                readers = self.values[value].readers
                while readers and readers[-1][0] >= start:  # readers stand in the order they ran
                    readers.pop()
        del self.ops[start:]

    def producer(self, value: Value) -> Op | None:
        return None if value.producer is None else self.ops[value.producer]

    def input(self, op: Op, role: str = "input") -> Value:
        return self.values[op.inputs[role]]

    def output(self, op: Op, index: int = 0) -> Value:
        return self.values[op.outputs[index]]

    def constant(self, value: Value) -> Tensor | None:
        """The numbers of a constant value, where they are known."""
        return self.tensors.get(value.handle) if value.handle else self.constants.get(value.id)

    def is_computed(self, value: Value) -> bool:
        """Whether a constant was computed: it is no stored tensor, nor a copy or a cast of one."""
        maker = self.producer(value)
        return value.constant and not value.handle and maker is not None and maker.kind != "identity"

    @functools.cached_property
    def coarsest(self) -> float:
        """The machine epsilon of the model's coarsest floating type; that of float32 where it has none."""
        types = {t.dtype for t in self.tensors.values() if t.is_floating_point()} or {torch.float32}
        return max(torch.finfo(dtype).eps for dtype in types)

    def of_kind(self, *kinds: str) -> Iterator[Op]:
        return (op for op in self.ops if op.kind in kinds)

    def signature(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by qualified name, with its shape."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}
