"""The calls of linear layers in an exported program, and the stored tensors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from bntool.observe.program_nodes import arguments_of, operator_of

_CONVS = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution""".split()
)
_TURNS = frozenset("t transpose permute".split())


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer: its operands, and how it reads its weight.

    `turned` are the nodes between the stored weight and the call, which transpose it.
    """

    node: Node
    kind: str
    input: Node
    weight: Node
    bias: Node | None
    turned: tuple[Node, ...] = ()


class Stored:
    """The parameters, buffers and constants of a program: the name of each placeholder, and the tensors.

    Names of one tensor (tied weights) are one: the first.
    """

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        given: Mapping[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.tensors: dict[str, Tensor] = {}
        self.name_of: dict[str, str] = {}
        self.names_of: dict[str, list[str]] = {}
        first: dict[Any, str] = {}
        for placeholder, name in given.items():
            tensor = program.state_dict.get(name, program.constants.get(name))
            if not isinstance(tensor, Tensor):
                continue
            main = first.setdefault(_place(tensor), name)
            self.name_of[placeholder] = main
            self.tensors.setdefault(main, tensor)
            names = self.names_of.setdefault(main, [])
            if name not in names:
                names.append(name)

    def name(self, node: Any) -> str:
        """The name of the tensor that a node is; empty where it is none that is stored."""
        return self.name_of.get(node.name, "") if isinstance(node, Node) and node.op == "placeholder" else ""


def _place(tensor: Tensor) -> Any:
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(tensor)
    if not storage:
        return id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def linear_calls(program: ExportedProgram, stored: Stored) -> dict[Node, LinearCall]:
    """Every call of a convolution, and every product with a matrix that is stored."""
    calls = (_call(node, stored) for node in program.graph.nodes)
    found = {call.node: call for call in calls if call is not None}
    return {node: call for node, call in found.items() if _turned_for_it_alone(call, found)}


def _call(node: Node, stored: Stored) -> LinearCall | None:
    name = operator_of(node)
    bound = arguments_of(node) if name else {}
    bias = bound.get("bias")
    if name in _CONVS:
        return LinearCall(node, "conv", bound["input"], bound["weight"], bias)
    if name == "linear":
        return LinearCall(node, "linear", bound["input"], bound["weight"], bias)
    if name == "addmm":
        plain = bound.get("beta", 1) == 1 and bound.get("alpha", 1) == 1
        if not plain or len(_shape(bound["self"])) != 1 or _shape(bound["self"])[0] != _shape(node)[1]:
            return None
        return _product(node, bound["mat1"], bound["mat2"], bound["self"], stored)
    if name in ("mm", "matmul"):
        return _product(node, bound["self"], bound["mat2" if name == "mm" else "other"], None, stored)
    return None


def _product(node: Node, data: Node, matrix: Node, bias: Node | None, stored: Stored) -> LinearCall | None:
    """X @ W for a stored matrix, also where a node before turns it."""
    if len(_shape(data)) < 2 or len(_shape(matrix)) != 2:
        return None
    if stored.name(matrix):
        return LinearCall(node, "matmul", data, matrix, bias)
    if operator_of(matrix) in _TURNS and _swaps(matrix):
        source = arguments_of(matrix)["self"]
        if stored.name(source):
            return LinearCall(node, "linear", data, source, bias, (matrix,))
    return None


def _swaps(node: Node) -> bool:
    bound = arguments_of(node)
    if "dims" in bound:
        return [d % 2 for d in bound["dims"]] == [1, 0]
    return bool(bound.get("dim0", 0) % 2 != bound.get("dim1", 1) % 2)


def _turned_for_it_alone(call: LinearCall, found: Mapping[Node, LinearCall]) -> bool:
    def reads_as_matrix(user: Node, turned: Node) -> bool:
        other = found.get(user)
        return other is not None and turned in other.turned and turned not in (other.input, other.bias)

    return all(reads_as_matrix(user, turned) for turned in call.turned for user in turned.users)


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def layer_names(calls: Iterator[LinearCall], stored: Stored) -> dict[str, str]:
    """For every stored weight the name of its layer: handles are `NAME.weight` and, where made, `NAME.bias`.

    A module's own name, unless a tensor with the name of the missing bias is there already.
    """
    biased: dict[str, bool] = {}
    for call in calls:
        name = stored.name(call.weight)
        if name:
            biased[name] = biased.get(name, True) and call.bias is not None
    layers = {}
    for name, all_biased in biased.items():
        owner, _, slot = name.rpartition(".")
        known = {other for names in stored.names_of.values() for other in names}
        own = owner and slot == "weight" and (all_biased or f"{owner}.bias" not in known)
        layers[name] = owner if own else name
    return layers
