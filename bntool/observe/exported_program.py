"""Observe an `ExportedProgram`: its graph as a neutral dataflow graph; nothing is run but small constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from bntool.graph.dataflow import Graph, Module, Op
from bntool.observe.aten import SHAPE_ONLY, product_of, translate
from bntool.observe.decomposed_norms import TakenApart, norms_taken_apart, put_together
from bntool.observe.program_calls import LinearCall
from bntool.observe.program_nodes import (
    arguments_of,
    has_tensor,
    in_batch_norm_module,
    operands_of,
    operator_of,
    scope_of,
)
from bntool.observe.program_values import ProgramValues

_NORM_ROLES = ("weight", "bias", "running_mean", "running_var")
_NORMS = {
    "batch_norm": "batch_norm",
    **dict.fromkeys(
        """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm _batch_norm_with_update
        _batch_norm_with_update_functional _batch_norm_no_update""".split(),
        "native_batch_norm",
    ),
}
_ALWAYS_TRAINING = frozenset({"_batch_norm_with_update", "_batch_norm_with_update_functional"})
_METADATA_READERS = frozenset(
    "sym_size sym_stride sym_numel sym_storage_offset _assert_tensor_metadata".split()
)
_RENAMED = {
    "lift_fresh_copy": "lift_fresh",
    **{f"_adaptive_avg_pool{d}d": f"adaptive_avg_pool{d}d" for d in (2, 3)},
}


@dataclasses.dataclass(frozen=True)
class ProgramObservation:
    """The graph, and what its names stand for in the program.

    `names` maps the handle of a stored tensor to the names it has in the program. `layers` and `norms` name
    the nodes of each linear layer and BatchNorm, `apart` the BatchNorms written out as arithmetic, whose
    nodes stand in a row. `hidden` names every BatchNorm inside a body, and says
    where. `open` tells whether some size is not fixed.
    """

    graph: Graph
    program: ExportedProgram
    names: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, tuple[str, ...]]
    apart: Mapping[str, TakenApart]
    hidden: tuple[tuple[str, str], ...]
    open: bool


def observe_program(program: ExportedProgram, sizes: int = 0) -> ProgramObservation:
    """The dataflow graph of an exported program; nothing is changed.

    An axis without a fixed size gets one, from the first (0) or the second (1) set of sizes. The body of a
    control-flow operator is one op.
    """
    reader = _Reader(program, sizes)
    with torch.no_grad():
        reader.read()
    return ProgramObservation(
        reader.graph,
        program,
        {reader.handle(name): tuple(names) for name, names in reader.stored.names_of.items()},
        {name: tuple(nodes) for name, nodes in reader.layers.items()},
        {name: tuple(nodes) for name, nodes in reader.norms.items()},
        reader.apart,
        tuple(_hidden_norms(program)),
        reader.sizes.open,
    )


def _hidden_norms(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    for path, module in program.graph_module.named_modules():
        if path and isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if operator_of(node) in _NORMS:
                    yield f"{path}.{node.name}", f"it stands in {path}, the body of another operator"


class _Reader(ProgramValues):
    def __init__(self, program: ExportedProgram, sizes: int) -> None:
        super().__init__(program, sizes)
        self.graph.model_class = "exported program"
        self.graph.rewirable = True
        self.layers: dict[str, list[str]] = {}
        self.norms: dict[str, list[str]] = {}
        self.apart: dict[str, TakenApart] = {}

    def read(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "get_attr":
                self.attribute(node)
            elif node.op == "output":
                self.outputs(node)
            elif node not in self.turned:
                self._call(node)
        self._block_mixed_layers()
        self._put_norms_together()

    # -- calls ------------------------------------------------------------------------------------------

    def _call(self, node: Node) -> None:
        name = operator_of(node)
        if str(node.target) == "<built-in function getitem>" and isinstance(node.args[0], Node):
            source, index = node.args[0], node.args[1]
            if index in self.parts.get(source, {}):
                self.values[node] = self.parts[source][index]  # type: ignore[index]
                self.graph.values[self.values[node]].name = node.name
                self.memory.add(node, [source])
                return
        if node in self.calls:
            self._linear(self.calls[node])
        elif name in _NORMS and self._is_layer(node):
            self._norm(node, name)
        elif name in _METADATA_READERS:
            return
        elif name:
            self._operator(node, name)
        elif any(self.values_of(source) for source in node.all_input_nodes) or has_tensor(node):
            self._opaque(node, str(node.target))

    def _linear(self, call: LinearCall) -> None:
        bound = self._numbers(arguments_of(call.node)) if call.kind == "conv" else {}
        operands = (call.input, call.weight, *([call.bias] if call.bias is not None else []))
        if bound is None or any(source not in self.values for source in operands):
            self._opaque(call.node, _odd(operator_of(call.node)))
            return
        inputs = {"input": self.values[call.input], "weight": self.values[call.weight]}
        if call.bias is not None:
            inputs["bias"] = self.values[call.bias]
        kind, attrs = translate(operator_of(call.node), bound) if call.kind == "conv" else (call.kind, {})
        layer, place = self.layer_of.get(self.stored.name(call.weight)), ""
        if layer is not None:
            self.layers.setdefault(layer, []).append(call.node.name)
            role = "conv" if kind == "conv" else "linear"
            module = Module(layer, operator_of(call.node), role=role, plain_bias=True)
            self.graph.modules.setdefault(layer, module).calls += 1
            place = f"{layer}@{call.node.name}"
        self.add(call.node, kind, inputs, attrs, layer or scope_of(call.node), place)

    def _is_layer(self, node: Node) -> bool:
        """Not one that standardises a weight, nor an InstanceNorm taken apart."""
        source = arguments_of(node)["input"]
        if source not in self.values or self.graph.values[self.values[source]].constant:
            return False
        return isinstance(arguments_of(node).get("running_mean"), Node) or in_batch_norm_module(node)

    def _norm(self, node: Node, operator: str) -> None:
        bound = arguments_of(node)
        bound.setdefault("eps", bound.get("epsilon"))
        bound.setdefault("training", operator in _ALWAYS_TRAINING)
        kind, attrs = translate(_NORMS[operator], bound)
        operands = {r: bound.get(r) for r in ("input", *_NORM_ROLES)}
        inputs = {role: self.values[n] for role, n in operands.items() if isinstance(n, Node)}
        name = self._norm_name(node, inputs, attrs)
        value = node.meta["val"]
        several = isinstance(value, tuple | list)
        made = self.new(value[0] if several else value)
        self.graph.add_op(kind, inputs, (made,), attrs=attrs, scope=name)
        self.memory.add(node, [])
        if not several:
            self.values[node] = made
            self.graph.values[made].name = node.name
        elif any(user.users for user in node.users if user.args[1] != 0):
            # what it saves is read: one whose node cannot go, whatever stands around it
            self.graph.modules[name] = Module(
                name, operator, role="norm" if attrs["training"] else "custom_norm"
            )
            saved = {i: self.new(v) for i, v in enumerate(value) if i and isinstance(v, Tensor)}
            self.graph.add_op(
                operator, {"input": inputs["input"]}, tuple(saved.values()), attrs={}, scope=name
            )
            self.parts[node] = {0: made, **saved}
        else:
            self.parts[node] = {0: made}
        self.norms.setdefault(name, []).append(node.name)
        self.graph.modules.setdefault(name, Module(name, operator, role="norm")).calls += 1

    def _norm_name(self, node: Node, inputs: dict[str, int], attrs: dict[str, Any]) -> str:
        """The module's name, where the statistics are that module's and no other call differs."""
        mean = inputs.get("running_mean")
        handle = self.graph.values[mean].handle if mean is not None else ""
        scope, (owner, _, slot) = scope_of(node), handle.rpartition(".")
        name = owner if slot == "running_mean" and in_batch_norm_module(node) else scope
        if not name or (handle and owner != name) or name in self.layers:
            return node.name
        for op in self.graph.of_kind("batch_norm"):
            same = all(op.inputs.get(role) == inputs.get(role) for role in _NORM_ROLES)
            if op.scope == name and not (same and op.attrs == attrs):
                return node.name
        return name

    def _operator(self, node: Node, name: str) -> None:
        bound = self._numbers(arguments_of(node))
        unread = SHAPE_ONLY.get(name, ())
        operands = dict(operands_of(bound or {}))
        if bound is None or any(s not in self.values for r, s in operands.items() if r not in unread):
            self._opaque(node, _odd(name))
            return
        kind, attrs = translate(_RENAMED.get(name, name), bound)
        inputs = {role: self.values[s] for role, s in operands.items() if role not in unread}
        if kind == "matmul":
            kind, inputs = product_of(inputs, self.graph.values)
        self.add(node, kind, inputs, attrs, scope_of(node))

    def _opaque(self, node: Node, kind: str) -> None:
        """An op that no law covers: whatever it reads must not change."""
        read = dict.fromkeys(value for source in node.all_input_nodes for value in self.values_of(source))
        self.add(node, kind, {f"input_{i}": v for i, v in enumerate(read)}, {}, "")

    def _numbers(self, bound: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments with a number for every size; None where one depends on the data."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)([plain(item) for item in value])
            if not isinstance(value, Node) or value in self.values or value in self.parts:
                return value
            known = value.meta.get("val")
            number = None if self.sizes.depends_on_data(known) else self.sizes.number(known)
            if number is None:
                raise LookupError
            return number

        try:
            return {name: plain(value) for name, value in bound.items()}
        except LookupError:
            return None

    def _block_mixed_layers(self) -> None:
        """Calls that read one weight each in its own way cannot share its edit."""
        ways: dict[int, set[Any]] = {}
        for op in self.graph.of_kind("conv", "linear", "matmul"):
            way = (op.kind, op.attrs.get("transposed"), op.attrs.get("groups"))
            ways.setdefault(op.inputs.get("weight", -1), set()).add(way)
        for weight, found in ways.items():
            if len(found) > 1:
                self.graph.add_op("another layer", {"input": weight}, (), attrs={})

    def _put_norms_together(self) -> None:
        """BatchNorms in elementary operators: a frozen layer's own arithmetic, or one that was decomposed."""

        def is_node(op: Op) -> bool:
            return op.id in self.nodes

        for found in norms_taken_apart(self.graph, is_node):
            nodes = [self.nodes[op.id] for op in found.ops]
            name = self._name_of_apart(nodes)
            self.norms[name], self.apart[name] = [node.name for node in nodes], found
            put_together(self.graph, found, name, f"{nodes[0].name}/")

    def _name_of_apart(self, nodes: list[Node]) -> str:
        """That of the BatchNorm module that all of it was traced in, else of the first node."""
        scope = scope_of(nodes[0])
        alone = all(in_batch_norm_module(node) and scope_of(node) == scope for node in nodes)
        return scope if scope and alone and scope not in self.graph.modules else nodes[0].name


def _odd(name: str) -> str:
    """The kind of a call that is none of its operator's kind, such as a product with a number of the data."""
    return f"{name} as it is called here"
