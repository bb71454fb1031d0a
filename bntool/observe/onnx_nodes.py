"""Names of ONNX nodes, and what stands in bodies and functions, out of reach of the main graph."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_STANDARD = ("", "ai.onnx")


def is_standard(node: ir.Node) -> bool:
    return node.domain in _STANDARD


def labels_of(model: ir.Model) -> dict[ir.Node, str]:
    """A name of its own for every node of the main graph: the node's, else one from its first output."""
    labels: dict[ir.Node, str] = {}
    taken: set[str] = set()
    for node in model.graph:
        outputs = [v.name for v in node.outputs if v.name]
        wanted = node.name or f"{outputs[0] if outputs else 'node'}/{node.op_type}"
        label, number = wanted, 1
        while label in taken:
            number += 1
            label = f"{wanted}_{number}"
        taken.add(label)
        labels[node] = label
    return labels


def opaque_kind(node: ir.Node) -> str:
    """The kind of an op that no law covers; bntool's own kinds are lower-case and without a domain."""
    return node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captured_by(node: ir.Node) -> list[ir.Value]:
    """The values from outside that the bodies of a node read or hand out."""
    inside: set[ir.Value] = set()
    read: list[ir.Value] = []
    graphs = list(bodies_of(node))
    while graphs:
        graph = graphs.pop()
        inside.update((*graph.inputs, *graph.initializers.values()))
        read.extend(graph.outputs)
        for inner in graph:
            inside.update(inner.outputs)
            read += [v for v in inner.inputs if v is not None]
            graphs += bodies_of(inner)
    return list(dict.fromkeys(v for v in read if v not in inside))


def hidden_norms(model: ir.Model, labels: dict[ir.Node, str]) -> list[tuple[str, str]]:
    """Every BatchNormalization inside a body or a function: its name, and where it stands."""
    found: list[tuple[str, str]] = []
    for node in model.graph:
        graphs = list(bodies_of(node))
        if graphs:
            place = f"it stands in the body of {node.op_type} {labels[node]}"
            found += [(name, place) for name in _norms_in(graphs)]
    for function in model.functions.values():
        place = f"it stands in the function {function.domain}::{function.name}"
        found += [(name, place) for name in _norms_in([function.graph])]
    return found


def _norms_in(graphs: list[ir.Graph]) -> Iterator[str]:
    waiting = list(graphs)
    while waiting:
        for node in waiting.pop():
            waiting += bodies_of(node)
            if is_standard(node) and node.op_type == "BatchNormalization":
                yield node.name or f"{node.outputs[0].name}/BatchNormalization"
