"""Who calls whom in a TorchScript module: over all blocks, branches and exported methods of its code.

A graph is shared by all modules of one class, and a traced one is handed modules as arguments. So the code is
walked from the methods of the module itself, each time with the modules that its values stand for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Call:
    """One place in the code, run for one module: what is called, how, and by whom."""

    callee: str
    method: str
    caller: str
    place: tuple[str, str, int]
    """The class of the caller, its method and the number of the node: alike for all modules of a class."""
    node: Any
    argument: str
    """The module whose result is the only argument; empty where that is something else."""
    read_once: bool
    """Whether the result is read in one place alone."""


class Calls:
    """The calls of submodules that a script's methods make, each place once.

    Args:
        script: the module; nothing in it is changed.

    `to` gives the calls by the qualified name of the callee, `read` the modules whose tensors others read,
    `functional` the places (module, method, number) that call batch_norm itself. `branches` tells whether the
    code branches on what it is given, and `unclear` what it calls on a module that cannot be told.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        self.modules: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        for name, module in script.named_modules(remove_duplicate=False):
            first = self._names.setdefault(hash(module._c), name)
            self.modules[name] = self.modules.get(first, module)
        self.to: dict[str, list[Call]] = {}
        self.read: dict[str, str] = {}
        self.functional: dict[tuple[str, str, int], None] = {}
        self.branches = False
        self.unclear = ""
        self._seen: set[tuple[str, str, tuple[str | None, ...]]] = set()
        self._places: set[tuple[str, str, str, int]] = set()
        for method in script._c._method_names():
            self._walk_method("", method, ())

    def _walk_method(self, name: str, method: str, others: tuple[str | None, ...]) -> None:
        key = (name, method, others)
        if key in self._seen:
            return
        self._seen.add(key)
        self._walk(name, method, self.modules[name]._c._get_method(method).graph, (name, *others))

    def _walk(self, name: str, method: str, graph: Any, given: tuple[str | None, ...]) -> None:
        known = {v.debugName(): what for v, what in zip(graph.inputs(), given, strict=False)}
        own = is_norm(self.modules[name])
        for place, node in enumerate(nodes_of(graph)):
            kind = node.kind()
            if kind == "prim::GetAttr":
                self._get(name, node, known)
            elif kind == "prim::SetAttr":
                self._touch(name, known.get(next(iter(node.inputs())).debugName()))
            elif kind == "prim::CallMethod":
                self._call((name, method, place), node, known)
            elif _is_batch_norm(node) and not own:
                self.functional[name, method, place] = None
            elif kind == "prim::If":
                self.branches |= not _is_own(self.modules[name]) and _varies(next(iter(node.inputs())))
            if node.hasAttribute("Subgraph"):  # a fork
                inputs = tuple(known.get(v.debugName()) for v in node.inputs())
                self._walk(name, f"{method}/{place}", node.g("Subgraph"), inputs)

    def _get(self, name: str, node: Any, known: dict[str, str | None]) -> None:
        owner = known.get(next(iter(node.inputs())).debugName())
        if owner is None:
            return
        path = ".".join(filter(None, (owner, node.s("name"))))
        if path in self.modules:
            known[node.output().debugName()] = self._names[hash(self.modules[path]._c)]
        elif "Tensor" in str(node.output().type()):
            self._touch(name, owner)

    def _touch(self, name: str, owner: str | None) -> None:
        if owner is not None and owner != name:
            self.read.setdefault(owner, name)

    def _call(self, place: tuple[str, str, int], node: Any, known: dict[str, str | None]) -> None:
        receiver, *given = node.inputs()
        callee, method = known.get(receiver.debugName()), node.s("name")
        if callee is None:
            if receiver.type().kind() != "ClassType" or self._is_a_module(receiver):
                self.unclear = f"{method} of {receiver.type()}"
            return
        others = tuple(known.get(v.debugName()) for v in given)
        self._walk_method(callee, method, others)
        if callee == place[0] or (callee, *place) in self._places:
            return
        self._places.add((callee, *place))
        source, argument = (given[0].node() if len(given) == 1 else None), ""
        if source is not None and source.kind() == "prim::CallMethod" and source.s("name") == "forward":
            argument = known.get(next(iter(source.inputs())).debugName()) or ""
        once = node.outputsSize() == 1 and len(node.output().uses()) == 1
        caller, within, number = place
        at = (type_of(self.modules[caller]), within, number)
        self.to.setdefault(callee, []).append(Call(callee, method, caller, at, node, argument, once))

    def _is_a_module(self, receiver: Any) -> bool:
        name = receiver.type().qualified_name()
        return any(type_of(module) == name for module in self.modules.values())


def type_of(module: Any) -> str:
    """The name of its class within the archive."""
    return str(module._c._type().qualified_name())


def is_norm(module: Any) -> bool:
    """Whether it is one of PyTorch's BatchNorms, by the name of its class."""
    return bool(module.original_name.startswith(("BatchNorm", "SyncBatchNorm")))


def _is_own(module: Any) -> bool:
    """Whether it is a layer of PyTorch's, which checks what it is given, and computes the same either way."""
    return type_of(module).startswith("__torch__.torch.nn.")


def _varies(value: Any) -> bool:
    """Whether a number hangs on what a method is given, and not on constants and settings alone."""
    node = value.node()
    if node.kind() in ("prim::GetAttr", "prim::Constant"):
        return False
    inner = [output for block in node.blocks() for output in block.outputs()]
    return bool(node.kind() == "prim::Param") or any(_varies(v) for v in (*node.inputs(), *inner))


def _is_batch_norm(node: Any) -> bool:
    if node.kind() != "prim::CallFunction":
        return bool(node.kind() == "aten::batch_norm")
    function = next(iter(node.inputs())).node()
    return bool(function.kind() == "prim::Constant" and function.s("name") == "batch_norm")


def nodes_of(graph: Any) -> Iterator[Any]:
    """Every node of a graph or block, those of inner blocks behind the one that holds them."""
    for node in graph.nodes():
        yield node
        for block in node.blocks():
            yield from nodes_of(block)
