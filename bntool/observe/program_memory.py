"""Which nodes of an exported program share memory, so that an in-place write is seen by all who see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

_SAME_PLACE = frozenset("detach alias lift_fresh dropout feature_dropout alpha_dropout".split())
"""Operators that hand on their very input, or leave it alone."""

_NEW_MEMORY = frozenset(
    """batch_norm instance_norm group_norm layer_norm linear matmul relu6 selu prelu log_sigmoid
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d avg_pool1d
    max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    scaled_dot_product_attention silu hardswish""".split()
)
"""Composite operators whose result is never a view."""


class Memory:
    """Storage and place of every tensor node: one place is the same memory, seen the same way."""

    def __init__(self) -> None:
        self._storages: dict[Node, frozenset[Node]] = {}
        self._place: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {}

    def add(self, node: Node, sources: list[Node], same_place: bool = False) -> None:
        """A node whose memory may be that of `sources`; of its own where there are none."""
        storages = frozenset().union(*(self._storages.get(s, frozenset({s})) for s in sources))
        self._storages[node] = storages or frozenset({node})
        self._place[node] = self._place.get(sources[0], sources[0]) if same_place and sources else node
        for storage in self._storages[node]:
            self._members.setdefault(storage, []).append(node)

    def storages(self, node: Node) -> frozenset[Node]:
        return self._storages.get(node, frozenset({node}))

    def same_place(self, node: Node, other: Node) -> bool:
        return self._place.get(node, node) is self._place.get(other, other)

    def sharing(self, node: Node) -> Iterator[Node]:
        """Every other node that may be, or may look into, the memory of `node`."""
        found = dict.fromkeys(m for s in self.storages(node) for m in self._members.get(s, ()))
        return (other for other in found if other is not node)


def shared_with(name: str, target: Any, bound: dict[str, Any]) -> tuple[list[Node], bool]:
    """The operands whose memory the result of an operator may be, and whether it is surely the same place."""
    schema = target._schema
    declared = {a.name for a in schema.arguments if a.alias_info is not None}
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    bare = name.rstrip("_")
    if written:
        return list(nodes_in([bound.get(n) for n in written])), True
    if bare in _SAME_PLACE:
        return list(nodes_in([bound.get("self", bound.get("input"))])), True
    if any(r.alias_info is not None for r in schema.returns):
        return list(nodes_in([bound.get(n) for n in declared])), False
    key = "CompositeImplicitAutograd"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)
    if composite and bare not in _NEW_MEMORY:
        # what is composed of other operators may be a view of an operand, and says nothing of it
        return list(nodes_in(list(bound.values()))), False
    return [], False


def nodes_in(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        yield from nodes_in(list(value.values()))
    elif isinstance(value, slice):
        yield from nodes_in([value.start, value.stop, value.step])
