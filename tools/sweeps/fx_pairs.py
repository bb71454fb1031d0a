"""Pairs of convolution and activation as torch.fx sees them: a second tracer beside the planner."""

from __future__ import annotations

import warnings

from torch import fx, nn

from bntool.core.plan import Plan
from bntool.core.reasons import Reason

_MODULES = {
    "silu": "SiLU Swish SwishMe",
    "gelu": "GELU GELUTanh QuickGELU",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "hardswish": "Hardswish HardSwish HardSwishMe HardSwishJit",
    "hardsigmoid": "Hardsigmoid HardSigmoid",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "leaky_relu": "LeakyReLU",
    "elu": "ELU",
    "selu": "SELU",
    "celu": "CELU",
    "mish": "Mish",
    "prelu": "PReLU",
    "softplus": "Softplus",
}
_KIND_OF = {name: kind for kind, names in _MODULES.items() for name in names.split()}
_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_STRUCTURAL = frozenset(
    {
        Reason.NO_ACTIVATION,
        Reason.OTHER_ACTIVATION,
        Reason.OUTPUT_USED_ELSEWHERE,
        Reason.CALLED_MORE_THAN_ONCE,
        Reason.ALREADY_NORMALISED,
        Reason.NOT_OBSERVED,
    }
)
"""Skips that say there is no such pair; all others say that the pair must be left alone."""


class _Leaves(fx.Tracer):
    """Every convolution and every activation known by its name is one node, and whatever is torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, nn.modules.conv._ConvNd) or type(m).__name__ in _KIND_OF
        return known or super().is_leaf_module(m, module_qualified_name)


def pairs(model: nn.Module) -> dict[str, str] | None:
    """Convolutions that one activation alone follows, with its kind; None where fx fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Leaves().trace(model)
    except Exception:  # noqa: BLE001 - tracing runs the model's own code, which fails in its own ways
        return None
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.modules.conv._ConvNd):
            calls.setdefault(str(node.target), []).append(node)
    found = {name: _activation(nodes[0], modules) for name, nodes in calls.items() if len(nodes) == 1}
    return {name: kind for name, kind in found.items() if kind}


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    while users := [user for user in node.users if not _reads_only_the_shape(user)]:
        first = modules.get(str(users[0].target)) if users[0].op == "call_module" else None
        # what an activation overwrites is its result to whoever reads it later
        if len(users) > 1 and not getattr(first, "inplace", False):
            return _gate(node, users)
        if first is None:
            return _called(users[0]) if users[0].op in ("call_function", "call_method") else ""
        if not isinstance(first, _THROUGH):
            return _KIND_OF.get(type(first).__name__, "")
        node = users[0]
    return ""


def _gate(node: fx.Node, users: list[fx.Node]) -> str:
    """x·sigmoid(x) and x·relu6(x + 3)/6, written out."""
    if len(users) != 2:
        return ""
    for user in users:
        alone = next(iter(user.users)) if len(user.users) == 1 else None
        if _called(user) == "sigmoid" and alone in users and set(alone.args) == {node, user}:
            return "silu"
        shifted = user.op == "call_function" and user.args == (node, 3.0) and alone is not None
        if shifted and _called(alone) == "relu6" and any(set(u.args) == {node, alone} for u in alone.users):
            return "hardswish"
    return ""


def _reads_only_the_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")


def _called(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    bare = str(name).rstrip("_")
    return bare if bare in _MODULES else ""


def disagreements(model: nn.Module, plan: Plan) -> list[str] | None:
    """Where the plan (any activation) and torch.fx see different pairs; None where fx cannot trace."""
    seen = pairs(model)
    if seen is None:
        return None
    sites = {site.conv: site.activation_kind for site in plan.insert_sites}
    denied = {skip.name for skip in plan.skips if skip.reason in _STRUCTURAL}
    wrong = [f"{name}: fx sees {kind}, the plan none" for name, kind in seen.items() if name in denied]
    for name, kind in sites.items():
        if kind in _MODULES and seen.get(name) != kind:
            wrong.append(f"{name}: the plan sees {kind}, fx {seen.get(name) or 'none'}")
    return wrong
