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
from bntool.observe.program_calls import LinearCall, Stored, layer_names, linear_calls
from bntool.observe.program_memory import Memory, nodes_in
from bntool.observe.program_nodes import (
    arguments_of,
    draws,
    has_tensor,
    in_batch_norm_module,
    operands_of,
    operator_of,
    scope_of,
    sharing,
    written_by,
)
from bntool.observe.program_sizes import Sizes
from bntool.observe.taken_apart import TakenApart, norms_taken_apart, put_together

_SMALL_CONSTANT = 1 << 16
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


class _Reader:
    def __init__(self, program: ExportedProgram, sizes: int) -> None:
        self.program = program
        self.graph = Graph()
        self.graph.model_class = "exported program"
        self.graph.rewirable = True
        self.sizes = Sizes(program, sizes)
        self.stored = Stored(program)
        self.calls = linear_calls(program, self.stored)
        self.layer_of = layer_names(iter(self.calls.values()), self.stored)
        self.memory = Memory()
        self.layers: dict[str, list[str]] = {}
        self.norms: dict[str, list[str]] = {}
        self.apart: dict[str, TakenApart] = {}
        self.nodes: dict[int, Node] = {}
        self.values: dict[Node, int] = {}
        self.parts: dict[Node, dict[int, int]] = {}
        self.by_handle: dict[str, int] = {}
        self.turned = {node for call in self.calls.values() for node in call.turned}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.written: set[str] = set()

    def read(self) -> None:
        self._find_written()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._attribute(node)
            elif node.op == "output":
                self._outputs(node)
            elif node not in self.turned:
                self._call(node)
        self._block_mixed_layers()
        self._put_norms_together()

    def handle(self, name: str) -> str:
        layer = self.layer_of.get(name)
        return f"{layer}.weight" if layer is not None else name

    # -- where values come from -------------------------------------------------------------------------

    def _find_written(self) -> None:
        """Stored tensors that the program writes to: what they hold at one moment is no constant."""
        signature = self.program.graph_signature
        mutated = {
            *signature.buffers_to_mutate.values(),
            *getattr(signature, "parameters_to_mutate", {}).values(),
        }
        memory = Memory()
        for node in self.program.graph.nodes:
            name = operator_of(node)
            bound = arguments_of(node) if name else {}
            memory.add(node, *sharing(name, node, bound))
            for argument in written_by(node, name, bound) if name else ():
                for target in nodes_in([bound.get(argument)]):
                    mutated.update(self.stored.name(storage) for storage in memory.storages(target))
        self.written = {name for name, names in self.stored.names_of.items() if mutated & {name, *names}}

    def _placeholder(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        name = self.stored.name(node)
        self.memory.add(node, [])
        if not name or name in self.written:
            self.values[node] = self._new(value)
            return
        handle = self.handle(name)
        if handle not in self.by_handle:
            tensor = self.stored.tensors[name]
            self.by_handle[handle] = self.graph.add_value(
                tuple(tensor.shape), handle=handle, constant=True, dtype=str(tensor.dtype)
            ).id
            self.graph.tensors[handle] = tensor
        self.values[node] = self.by_handle[handle]

    def _attribute(self, node: Node) -> None:
        found: Any = self.program.graph_module
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        if isinstance(found, Tensor):
            made = self.graph.add_value(tuple(found.shape), constant=True, dtype=str(found.dtype))
            self.graph.constants[made.id] = found
            self.values[node] = made.id
            self.memory.add(node, [])

    def _outputs(self, node: Node) -> None:
        for value in dict.fromkeys(v for source in node.all_input_nodes for v in self._values_of(source)):
            self.graph.values[value].is_output = True
            if self.graph.values[value].handle:
                self.graph.add_op("output", {"input": value}, (), attrs={})

    def _new(self, value: Tensor, *, constant: bool = False) -> int:
        return self.graph.add_value(self.sizes.shape(value), constant=constant, dtype=str(value.dtype)).id

    def _values_of(self, node: Node) -> list[int]:
        own = [self.values[node]] if node in self.values else []
        return own + list(self.parts.get(node, {}).values())

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
        elif any(self._values_of(source) for source in node.all_input_nodes) or has_tensor(node):
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
        self._add(call.node, kind, inputs, attrs, layer or scope_of(call.node), place)

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
        made = self._new(value[0] if several else value)
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
            saved = {i: self._new(v) for i, v in enumerate(value) if i and isinstance(v, Tensor)}
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
        self._add(node, kind, inputs, attrs, scope_of(node))

    def _opaque(self, node: Node, kind: str) -> None:
        """An op that no law covers: whatever it reads must not change."""
        read = dict.fromkeys(value for source in node.all_input_nodes for value in self._values_of(source))
        self._add(node, kind, {f"input_{i}": v for i, v in enumerate(read)}, {}, "")

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

    def _add(
        self,
        node: Node,
        kind: str,
        inputs: dict[str, int],
        attrs: dict[str, Any],
        scope: str,
        place: str = "",
    ) -> None:
        name = operator_of(node)
        bound = arguments_of(node) if name else {}
        targets = [n for a in written_by(node, name, bound) for n in nodes_in([bound.get(a)])] if name else []
        made = self._results(node, targets, inputs)
        values = tuple(value for value in made.values())
        sources, same_place = sharing(name, node, bound)
        seen = {value for source in sources for value in self._values_of(source)}
        op = self.graph.add_op(
            kind,
            inputs,
            values,
            attrs=attrs,
            scope=scope,
            inplace=bool(targets),
            views=tuple(role for role, value in inputs.items() if value in seen),
            place=place,
        )
        self.nodes[op.id] = node
        self.memory.add(node, sources, same_place)
        if isinstance(node.meta.get("val"), tuple | list):
            self.parts[node] = made
        elif made:
            self.values[node] = made[0]
            self.graph.values[made[0]].name = node.name
        for target, value in zip(targets, values, strict=False):
            self._overwrite(node, target, value)

    def _results(self, node: Node, targets: list[Node], inputs: dict[str, int]) -> dict[int, int]:
        if targets:
            return {i: self._new(target.meta["val"]) for i, target in enumerate(targets)}
        value = node.meta.get("val")
        found = dict(enumerate(value)) if isinstance(value, tuple | list) else {0: value}
        numbers = self._computed(node) if len(found) == 1 else None
        fixed = numbers is not None or (bool(inputs) and self._is_fixed(node, inputs))
        made = {i: self._new(v, constant=fixed) for i, v in found.items() if isinstance(v, Tensor)}
        if numbers is not None and 0 in made:
            self.graph.constants[made[0]] = numbers
        return made

    def _is_fixed(self, node: Node, inputs: Mapping[str, int]) -> bool:
        return not draws(node) and all(self.graph.values[value].constant for value in inputs.values())

    def _computed(self, node: Node) -> Tensor | None:
        """The numbers of a small constant, computed by the operator itself."""
        value = node.meta.get("val")
        small = isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)
        if not (small and operator_of(node)) or draws(node) or value.numel() > _SMALL_CONSTANT:  # type: ignore[union-attr]
            return None
        known: dict[Node, Tensor] = {}
        for source in node.all_input_nodes:
            if source not in self.values:
                return None
            constant = self.graph.constant(self.graph.values[self.values[source]])
            if constant is None or constant.numel() > _SMALL_CONSTANT:
                return None
            known[source] = constant
        arguments = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        result = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None

    def _overwrite(self, node: Node, target: Node, value: int) -> None:
        """An in-place write: every node that still reads the memory sees something new."""
        if any(storage.op == "placeholder" for storage in self.memory.storages(target)):
            self.graph.values[value].escapes = True
        for other in (target, *self.memory.sharing(target)):
            later = any(self.order[user] > self.order[node] for user in other.users)
            if other is node or other not in self.values or not later:
                continue
            if self.memory.same_place(other, target):
                self.values[other] = value
                continue
            before = self.values[other]
            mixed = self._new(other.meta["val"])
            self.graph.add_op(
                "overwritten_view", {"input": before, "other": value}, (mixed,), attrs={}, views=("other",)
            )
            self.values[other] = mixed

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
