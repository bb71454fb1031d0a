"""Names of ONNX nodes, their bodies, and what stands in functions, out of reach of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

_STANDARD = ("", "ai.onnx")


def is_standard(node: ir.Node) -> bool:
    return node.domain in _STANDARD


def labels_of(model: ir.Model) -> dict[ir.Node, str]:
    """A name of its own for every node, in bodies too: the node's, else one from its first output."""
    labels: dict[ir.Node, str] = {}
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        outputs = [v.name for v in node.outputs if v.name]
        wanted = node.name or f"{outputs[0] if outputs else 'node'}/{node.op_type}"
        labels[node] = free_name(wanted, taken)
    return labels


def free_name(wanted: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; it is taken from now on."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def opaque_kind(node: ir.Node) -> str:
    """The kind of an op that no law covers; bntool's own kinds are lower-case and without a domain."""
    return node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def handed_out(node: ir.Node) -> list[ir.Value]:
    """The values that a node's bodies give, whatever made them."""
    return [value for body in bodies_of(node) for value in body.outputs]


def stored_tensors(model: ir.Model) -> dict[str, tuple[ir.Value, Any]]:
    """The tensors that a model keeps, by name: initializers, of bodies too, and floating Constant nodes.

    A single number in a Constant is part of the arithmetic, not of the weights.
    """
    found: dict[str, tuple[ir.Value, Any]] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                found[name] = value, value.const_value
    for node in model.graph.all_nodes():
        held = node.attributes.get("value") if is_standard(node) and node.op_type == "Constant" else None
        tensor = held.as_tensor() if held is not None else None
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1:
            found[str(node.outputs[0].name)] = node.outputs[0], tensor
    return found


def hidden_norms(model: ir.Model) -> list[tuple[str, str]]:
    """Every BatchNormalization inside a function that stays a call: its name, and where it stands."""
    found: list[tuple[str, str]] = []
    for function in model.functions.values():
        place = f"it stands in the function {function.domain}::{function.name}"
        for node in function.graph.all_nodes():
            if is_standard(node) and node.op_type == "BatchNormalization":
                found.append((node.name or f"{node.outputs[0].name}/BatchNormalization", place))
    return found
