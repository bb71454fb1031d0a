"""What one node of an exported program says of itself: its operator, arguments, module and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bntool.observe.program_memory import shared_with
from bntool.observe.side_effects import undeclared_writes


def operator_of(node: Node) -> str:
    """The ATen operator that a node calls, without its overload; empty for anything else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call by their names in the schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def sharing(name: str, node: Node, bound: dict[str, Any]) -> tuple[list[Node], bool]:
    return shared_with(name, node.target, bound) if name else (list(node.all_input_nodes), False)


def written_by(node: Node, name: str, bound: dict[str, Any]) -> list[str]:
    """The arguments whose numbers a call may change."""
    if name == "detach_":
        return []
    schema = node.target._schema  # type: ignore[union-attr]
    declared = (a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return [*declared, *undeclared_writes(name, bound)]


def draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def operands_of(bound: dict[str, Any]) -> Iterator[tuple[str, Node]]:
    for name, item in bound.items():
        role = "input" if name == "self" else name
        if isinstance(item, Node):
            yield role, item
        elif isinstance(item, tuple | list):
            yield from ((f"{role}_{i}", entry) for i, entry in enumerate(item) if isinstance(entry, Node))


def has_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) for v in values)


def scope_of(node: Node) -> str:
    """The innermost module that the node was traced in, as the model names it."""
    stack = node.meta.get("nn_module_stack") or {}
    innermost = list(stack.values())[-1] if stack else ("",)
    name = innermost[0] if isinstance(innermost, tuple | list) else ""
    return "" if name.startswith("_empty") else name.partition("@")[0]


def in_batch_norm_module(node: Node) -> bool:
    """Whether the innermost module is a BatchNorm by the name of its class."""
    stack = node.meta.get("nn_module_stack") or {}
    innermost = list(stack.values())[-1] if stack else ("", "")
    kind = innermost[1] if isinstance(innermost, tuple | list) else ""
    return "BatchNorm" in (kind if isinstance(kind, str) else getattr(kind, "__qualname__", ""))
