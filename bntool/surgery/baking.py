"""Weights that a layer computes from its own parameters, made plain: the layer stores what it computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bntool.core.schema import Damaged
from bntool.graph.dataflow import Graph, Op
from bntool.graph.inputs import Inputs
from bntool.layers import NORMED, computes_weight
from bntool.observe.copying import structural_copy
from bntool.observe.eager import observe
from bntool.observe.modules import role_of

_TENSORS = ("weight", "bias")


def with_plain_weights(model: nn.Module, graph: Graph) -> tuple[nn.Module, tuple[str, ...]]:
    """A structural copy in which every convolution and linear layer whose weight rests on parameters alone is
    one of PyTorch's own that stores it, and the names of those layers.

    That is so of parametrizations (weight and spectral normalisation, in eval mode), of pruning masks, of a
    largest norm, and of a forward that standardises its weight and then calls the operator as the layer of
    PyTorch would. A layer that does more stays. What the copy stores is what `graph` saw in eval mode.
    """
    found: dict[str, Op] = {}
    for op in graph.of_kind("conv", "linear"):
        if _is_whole_layer(graph, op) and found.get(op.scope) is None:
            found[op.scope] = op
    if not found:
        return model, ()
    copied = structural_copy(model)
    modules: dict[str, Any] = dict(copied.named_modules())
    done = tuple(name for name, op in found.items() if _made_plain(modules[name], graph, op))
    return (copied, done) if done else (model, ())


def with_these_plain(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A structural copy in which these layers are plain, each told by a run of its own.

    Raises `Damaged` for a name that is no layer which computes its weight.
    """
    copied = structural_copy(model)
    modules: dict[str, Any] = dict(copied.named_modules())
    for name in names:
        layer: Any = modules.get(name)
        graph = observe(layer, Inputs((_probe(layer),))).graph if _is_layer(layer) else Graph()
        op = next((op for op in graph.of_kind("conv", "linear") if _is_whole_layer(graph, op)), None)
        if op is None or not _made_plain(layer, graph, op):
            raise Damaged(f"{name!r} is no layer whose weight can be stored", "options.bake")
    return copied


def _is_layer(layer: Any) -> bool:
    return isinstance(layer, nn.Module) and role_of(type(layer)) in ("conv", "linear")


def _probe(layer: Any) -> Tensor:
    """An input of a layer that meets each of its weights once."""
    like: Tensor = next(layer.parameters())
    if isinstance(layer, nn.Linear):
        return like.new_zeros(1, layer.in_features)
    sides = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return like.new_zeros(1, layer.in_channels, *sides)


def _is_whole_layer(graph: Graph, op: Op) -> bool:
    """Whether all that a layer does with its data is this one call, with a weight that it computes itself."""
    module = graph.modules.get(op.scope)
    if module is None or module.role not in ("conv", "linear") or op.call >= len(module.whole):
        return False
    weight = graph.input(op, "weight")
    if not graph.is_computed(weight) or weight.id not in graph.constants:
        return False
    ran = (graph.ops[i] for i in module.whole[op.call])
    on_data = [one.id for one in ran if not all(graph.values[v].constant for v in one.outputs)]
    ends = module.inputs[op.call], module.outputs[op.call]
    return on_data == [op.id] and ends == (op.inputs["input"], op.outputs[0])


def _made_plain(layer: Any, graph: Graph, op: Op) -> bool:
    """Turn the layer where it stands into PyTorch's own; False where that would do something else."""
    stock = next((cls for cls in type(layer).__mro__ if cls in NORMED), None)
    if stock is None or "forward" in vars(layer) or not _calls_alike(layer, op):
        return False
    trains = any(p.requires_grad for p in layer.parameters())
    stored: dict[str, Any] = {}
    for role in _TENSORS:
        value = graph.input(op, role) if role in op.inputs else None
        numbers = None if value is None else graph.constant(value)
        if value is not None and numbers is None:
            return False
        own = layer._parameters.get(role)
        kept = value is not None and value.handle and isinstance(own, nn.Parameter)
        stored[role] = own if kept else _parameter(numbers, trains)
    state = {name: item for name, item in vars(layer).items() if name not in _TENSORS}
    state |= {"_parameters": stored, "_buffers": {}, "_modules": {}}
    for hooks in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        if isinstance(state.get(hooks), dict):
            state[hooks] = OrderedDict((k, h) for k, h in state[hooks].items() if not computes_weight(h))
    layer.__class__ = stock
    layer.__dict__ = state
    return True


def _parameter(numbers: Tensor | None, trains: bool) -> nn.Parameter | None:
    return None if numbers is None else nn.Parameter(numbers.detach().clone(), requires_grad=trains)


def _calls_alike(layer: Any, op: Op) -> bool:
    """Whether PyTorch's own forward would call the operator with what it was called with."""
    if op.kind == "linear":
        return isinstance(layer, nn.Linear)
    own = ("stride", "padding", "dilation", "groups")
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return all(getattr(layer, name, None) == op.attrs[name] for name in own)


def note_on(names: tuple[str, ...]) -> str:
    """What is said of layers whose weights were made plain."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    many = len(names) != 1
    return (
        f"the weight{'s' if many else ''} of {len(names)} layer{'s' if many else ''} made plain ({shown}): "
        "training no longer goes through what computed them"
    )
