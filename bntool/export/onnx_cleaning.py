"""Clean what torch's exporter writes, without folding any BatchNormalization: that is for the user to see.

Only passes that change no number: constant folding, identities, common subexpressions, dead code. The
exporter writes a bias that a convolution does not have as a chain that expands a zero, for 3d convolutions
in a shape that ONNX Runtime refuses; such a bias is taken out again.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from bntool.core.errors import ExportError, InvariantError
from bntool.observe.onnx_nodes import free_name

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial Dropout".split()
)
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NARROW_TYPES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def clean(model: ir.Model, own_names: Iterable[str]) -> int:
    """Clean a freshly exported model in place; `own_names` are the names of the torch model's tensors.

    Returns how many BatchNormalizations normalised weights, not data (weight standardisation): what such
    a one reads and makes is computed here, once. Raises `ExportError` when a BatchNormalization is in
    training form, `InvariantError` when cleaning lost one.
    """
    from onnxscript.optimizer import fold_constants

    own_names = set(own_names)
    common.InlinePass()(model)
    before = census(model)["BatchNormalization"]
    of_weights = _compute_standardised_weights(model)
    before -= of_weights
    fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
    refuse_training_form(model)
    _drop_added_zeros(model)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    after = census(model)["BatchNormalization"]
    if before != after:
        raise InvariantError(
            f"cleaning changed the number of BatchNormalization nodes from {before} to {after}"
        )
    _drop_made_up_biases(model, own_names)
    _name_computed_weights(model, own_names)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)
    _name_nodes(model, own_names)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces with the paths of this machine
    return of_weights


def _should_fold(node: ir.Node) -> bool | None:
    """Never a BatchNormalization; None leaves the rest to the folder's own rules."""
    return False if node.op_type == "BatchNormalization" else None


def _compute_standardised_weights(model: ir.Model) -> int:
    """Store what the BatchNormalizations that standardise weights come to; returns how many there were.

    Raises `ExportError` for one that is not computed in float32 or float64: in a narrower type the
    statistics would be far off.
    """
    from onnxscript.optimizer import fold_constants

    cone = _standardised_weights(model.graph)
    norms = [node for node in cone if node.op_type == "BatchNormalization"]
    if not norms:
        return 0
    for norm in norms:
        _to_inference_form(norm)
    before = census(model)["BatchNormalization"]
    read = [value for node in cone for value in node.inputs if value is not None and value.is_initializer()]
    narrow = any(value.dtype in _NARROW_TYPES for value in read)
    # by name, since the folder puts new nodes in the place of some
    names = {value.name for node in cone for value in node.outputs}
    fold_constants(
        model,
        should_fold=lambda node: any(value.name in names for value in node.outputs),
        output_size_limit=sys.maxsize,
    )
    common.RemoveUnusedNodesPass()(model)
    if before - census(model)["BatchNormalization"] != len(norms) or narrow:
        raise ExportError(
            "a weight that a BatchNorm standardises cannot be computed for the file",
            where=_module_of(norms[0]),
            next_step="export in float32; or store the standardised weight in the layer itself",
        )
    return len(norms)


def _standardised_weights(graph: ir.Graph) -> set[ir.Node]:
    """The BatchNormalizations that normalise the weight of a layer by its own statistics, and all that leads
    from stored tensors to them and on to the layer.
    """
    fixed: dict[ir.Node, set[ir.Node]] = {}  # each node that reads no data, and those before it
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        makers = [value.producer() for value in sources if not value.is_initializer()]
        if node.op_type in _RANDOM or _holds_a_graph(node):
            continue
        if any(maker is None or maker not in fixed for maker in makers):
            continue
        fixed[node] = {maker for maker in makers if maker is not None}
    norms = {node for node in fixed if node.op_type == "BatchNormalization" and _by_own_statistics(node)}
    after = set(norms)
    for node, before in fixed.items():
        if before & after:
            after.add(node)
    weights = {
        value.producer() for node in graph if node.op_type in _LAYERS for value in node.inputs[1:2] if value
    }
    cone = {node for node in after if node in weights}
    for node in reversed(fixed):
        if node in cone:
            cone |= fixed[node]
    return cone if cone & norms else set()


def _holds_a_graph(node: ir.Node) -> bool:
    return any(
        attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()
    )


def _by_own_statistics(norm: ir.Node) -> bool:
    """Whether mean and variance are computed, as torch's exporter writes them out, and not stored."""
    makers = [value.producer() for value in norm.inputs[3:5] if value is not None]
    return all(maker is not None and maker.op_type != "Constant" for maker in makers)


def _to_inference_form(norm: ir.Node) -> None:
    """The legacy exporter writes training form: by the statistics of what it reads, which it is given too."""
    if not any(value.uses() for value in norm.outputs[1:]):
        norm.attributes.pop("training_mode", None)
        norm.resize_outputs(1)


def _name_computed_weights(model: ir.Model, own_names: set[str]) -> None:
    """Weights that were computed here are called after the layer that reads them."""
    taken = set(own_names)
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        if weight is None or weight.const_value is None or weight.name in own_names or not _module_of(node):
            continue
        rename_values([weight], [free_name(f"{_module_of(node)}.weight_computed", taken)], model.graph)


def census(model: ir.Model) -> Counter[str]:
    """How many nodes of each op the graph holds, subgraphs included."""
    return Counter(node.op_type for node in model.graph.all_nodes())


def refuse_training_form(model: ir.Model) -> None:
    """Raise `ExportError` when a BatchNormalization normalises with the statistics of the batch."""
    for node in model.graph.all_nodes():
        mode = node.attributes.get("training_mode")
        if node.op_type == "BatchNormalization" and mode is not None and mode.value:
            raise ExportError(
                "a BatchNormalization was exported in training form",
                where=_module_of(node) or str(node.name),
                next_step="give the layer running statistics with `bntool calibrate`",
            )


def rename_values(values: Sequence[ir.Value], names: Sequence[str], graph: ir.Graph) -> None:
    """Give each value its name; whatever else has that name gives way."""
    wanted = dict(zip(map(id, values), names, strict=True))
    taken = set(names)
    for other in _values(graph):
        if other.name in taken and id(other) not in wanted:
            other.name = free_name(f"{other.name}_value", taken)
    # Through names that nobody has, so that two values may swap theirs.
    for at, value in enumerate(values):
        value.name = f"bntool.renaming.{at}"
    for value in values:
        value.name = wanted[id(value)]


def rename_initializers(model: ir.Model, aliases: Mapping[str, str]) -> None:
    """Give a tied weight the first of its names in the torch model, where the exporter took a later one."""
    initializers = model.graph.initializers
    for old, new in aliases.items():
        if old in initializers and new not in initializers:
            value = initializers[old]
            rename_values([value], [new], model.graph)


def name_axes(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Give each open axis its name wherever its symbol stands, also inside an expression."""
    if not symbols:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        dims: list[Any] = [
            ir.SymbolicDim(pattern.sub(lambda found: symbols[found[0]], d.value))
            if isinstance(d, ir.SymbolicDim) and d.value
            else d
            for d in value.shape
        ]
        value.shape = ir.Shape(dims)


def _drop_made_up_biases(model: ir.Model, own_names: set[str]) -> None:
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is None or bias.name in own_names or bias.const_value is None:
            continue
        if not bias.const_value.numpy().any():
            node.resize_inputs(2)


def _drop_added_zeros(model: ir.Model) -> None:
    """What is added to zeros of its own shape, as a branch gives that another took in, is left as it is."""
    for node in list(model.graph):
        ways = {"Add": (node.inputs, node.inputs[::-1]), "Sub": (node.inputs[::-1],)}
        for zeros, other in ways.get(node.op_type, ()):
            if _is_expanded_zero(zeros) and other is not None and _are_of_one_shape(other, node.outputs[0]):
                same = ir.node("Identity", [other], metadata_props=node.metadata_props)
                ir.convenience.replace_nodes_and_values(
                    model.graph, node, [node], [same], node.outputs, same.outputs
                )
                break


def _are_of_one_shape(one: ir.Value, other: ir.Value) -> bool:
    """Whether both shapes are known, axis by axis, and the same."""
    known = [[getattr(size, "value", size) for size in v.shape] if v.shape else [None] for v in (one, other)]
    return None not in known[0] and known[0] == known[1]


def _is_expanded_zero(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "Expand":
        return False
    while maker is not None and maker.op_type in ("Expand", "Cast", "CastLike"):
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "ConstantOfShape":
        return "value" not in maker.attributes or not maker.attributes["value"].as_tensor().numpy().any()
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _name_nodes(model: ir.Model, own_names: set[str]) -> None:
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        module = _module_of(node) or _owner_of_weights(node, own_names)
        node.name = free_name(f"{module}/{node.op_type}" if module else node.op_type, taken)


def _module_of(node: ir.Node) -> str:
    """The qualified name of the layer a node comes from; empty for the model itself or where unknown."""
    scopes = node.metadata_props.get(_NAME_SCOPES)
    if not scopes:
        return ""
    names = [name for name in ast.literal_eval(scopes)[:-1] if name]
    return str(names[-1]) if names else ""


def _owner_of_weights(node: ir.Node, own_names: set[str]) -> str:
    """The layer whose weights a node reads: a trace tells no more of where a node comes from."""
    read = [value.name for value in node.inputs if value is not None and value.name in own_names]
    return read[0].rpartition(".")[0] if read and read[0] else ""


def _values(graph: ir.Graph) -> list[ir.Value]:
    found: dict[int, ir.Value] = {id(v): v for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        found.update((id(v), v) for v in node.outputs)
    return list(found.values())
