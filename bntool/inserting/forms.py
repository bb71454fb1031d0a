"""How a module tree can take in a new BatchNorm: the least intrusive form that fits."""

from __future__ import annotations

from collections.abc import Sequence

from bntool.core.options import InsertOptions
from bntool.core.reasons import Reason
from bntool.graph.dataflow import Graph, Module, Value
from bntool.inserting.activations import Activation
from bntool.inserting.places import Form

STOCK = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *(f"conv.Conv{d}d" for d in (1, 2, 3)),
        *(f"conv.ConvTranspose{d}d" for d in (1, 2, 3)),
        "linear.Linear",
    )
)
"""Layers of exactly these classes can become the subclass that holds a BatchNorm."""


class Refuse(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail


def form_of(
    graph: Graph,
    options: InsertOptions,
    layer: Module,
    activations: Sequence[Activation],
    value: Value,
) -> tuple[Form, str, str]:
    """The first form that fits and is not banned: (form, slot, child it comes after); else `Refuse`."""
    name = layer.name
    banned = options.banned.get(name, frozenset())
    act = activation_module(graph, activations)
    after = options.position == "after"
    if "identity" not in banned and layer.calls == 1:
        for slot in value.through:
            info = graph.modules[slot]
            if info.role == "identity" and info.calls == 1 and not info.hooked:
                return "identity", slot, ""
    if "sequential" not in banned and act is not None:
        parent, _, child = name.rpartition(".")
        act_parent, _, act_child = act.name.rpartition(".")
        info_parent = graph.modules.get(parent)
        if (
            info_parent is not None
            and parent == act_parent
            and info_parent.role == "sequential"
            and info_parent.calls == layer.calls
            and _in_order(info_parent.children, child, act_child)
        ):
            return "sequential", parent, act_child if after else child
    if "wrap" not in banned and act is not None and act.own_tensors == 0 and not act.hooked:
        return "wrap", act.name, ""
    own_class: Form = "pair" if options.portable else "subclass"
    if own_class not in banned and not after and layer.kind in STOCK:
        return own_class, name, ""
    if layer.kind not in STOCK and not after:
        raise Refuse(Reason.CUSTOM_FORWARD, f"{layer.kind} has a forward of its own")
    if after:
        raise Refuse(Reason.NOT_A_MODULE, "its activation is a function call; nothing can follow it")
    raise Refuse(Reason.FORM_BROKE_MODEL, "every form that fits changed what the model computes")


def activation_module(graph: Graph, activations: Sequence[Activation]) -> Module | None:
    """The module that is nothing but these activations, call by call; None for a function call."""
    scope = activations[0].last.scope
    module = graph.modules.get(scope)
    if module is None:
        return None
    ran = [[op.id for op in activation.ops] for activation in activations]
    if module.whole != ran or module.role or module.children:
        return None
    return module


def _in_order(children: Sequence[str], first: str, second: str) -> bool:
    """Whether a Sequential runs `first` before `second`; what stands between keeps the channels."""
    return first in children and second in list(children)[list(children).index(first) + 1 :]
