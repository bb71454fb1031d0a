"""Apply an insertion plan to an `nn.Module`: a structural copy with the newcomers in their slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bntool.core.errors import InvariantError
from bntool.core.plan import Plan
from bntool.core.sites import DroppedBias, InsertSite
from bntool.inserting import sequential_names
from bntool.layers import NORMED, BatchNormPerCall, count_calls_anew, load_old_checkpoints
from bntool.observe.copying import structural_copy
from bntool.surgery.replacing import Slots

_NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def apply_insert(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with every site of an insertion plan carried out.

    Tensors of the old layers are shared with `model`. The argument is not changed.
    """
    copy = structural_copy(model)
    modules = dict(copy.named_modules(remove_duplicate=False))
    slots = Slots(copy)
    newcomers: dict[str, dict[str, nn.Module]] = {}
    for site in plan.insert_sites:
        norm = _newcomer(modules[site.conv], site, plan.options)
        if site.form == "identity":
            slots.replace(modules[site.slot], norm)
        elif site.form == "wrap":
            act = modules[site.slot]
            after = plan.options.get("position") == "after"
            wrapped = nn.Sequential(*((act, norm) if after else (norm, act)))
            wrapped.training = act.training
            slots.replace(act, wrapped)
        elif site.form == "subclass":
            slots.replace(modules[site.conv], _holding(modules[site.conv], norm))
        elif site.form == "pair":
            layer = modules[site.conv]
            pair = nn.Sequential(layer, norm)
            pair.training = layer.training
            slots.replace(layer, pair)
        else:
            child = site.activation if plan.options.get("position") == "after" else site.conv
            newcomers.setdefault(site.slot, {})[child.rpartition(".")[2]] = norm
    for parent, group in newcomers.items():
        _add_siblings(modules[parent], group, bool(plan.options.get("keep_keys")))
    _require_names(copy, plan)
    load_old_checkpoints(copy, [name for site in plan.insert_sites for name in site.norms])
    for dropped in plan.dropped:
        _move_bias(modules[dropped.conv], dropped, dict(copy.named_modules(remove_duplicate=False)))
    if any(site.calls > 1 for site in plan.insert_sites):
        count_calls_anew(copy)
    return copy


def _newcomer(layer: nn.Module, site: InsertSite, options: Mapping[str, Any]) -> nn.Module:
    """The BatchNorm of a site; one for each call where the layer runs several times."""
    if site.calls == 1:
        return new_norm(layer, site, options)
    norms = BatchNormPerCall([new_norm(layer, site, options) for _ in range(site.calls)])
    norms.training = layer.training
    return norms


def _move_bias(layer: nn.Module, dropped: DroppedBias, modules: Mapping[str, nn.Module]) -> None:
    """BN(W·x + b) as BN'(W·x): the running mean loses b, in float64 and rounded once."""
    bias = layer.bias
    assert isinstance(bias, Tensor)
    layer.register_parameter("bias", None)
    for name in dropped.norms:
        norm = modules.get(name)
        if not isinstance(norm, nn.modules.batchnorm._NormBase) or norm.num_features != len(bias):
            raise InvariantError(f"the plan moves {dropped.bias} into {name}, which has not its channels")
        mean = norm.running_mean
        if isinstance(mean, Tensor):  # else the mean of each batch takes the bias away
            moved = (mean.double() - bias.detach().double()).to(mean.dtype)
            norm._buffers["running_mean"] = moved


def new_norm(layer: nn.Module, site: InsertSite, options: Mapping[str, Any]) -> nn.Module:
    """The BatchNorm of a site, on the layer's device and in its type and mode.

    `identity`: γ = 1, β = 0, μ = 0 and σ² = 1 − ε, so that in eval mode (x − μ)/√(σ² + ε)·γ + β is x
    to the last bit. `calibrate` starts so too, to be measured. `default`: PyTorch's own initial values,
    for training from scratch.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind = nn.SyncBatchNorm if options.get("sync") else _NORMS[site.dims]
    norm = kind(
        site.channels,
        eps=float(options["eps"]),
        momentum=float(options["momentum"]),
        affine=bool(options["affine"]),
        device=weight.device,
        dtype=weight.dtype,
    )
    if options["init"] != "default" and norm.running_var is not None:
        with torch.no_grad():
            norm.running_var.fill_(1.0 - norm.eps)
    norm.train(layer.training)
    return norm


def _holding(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer as the subclass that holds a BatchNorm; its tensors, attributes and hooks are kept."""
    cls = NORMED[type(layer)]
    held = cls.__new__(cls)
    held.__dict__.update(layer.__dict__)
    held._modules = {**layer._modules, "bn": norm}
    return held


def _add_siblings(parent: nn.Module, after: Mapping[str, nn.Module], keep_keys: bool) -> None:
    """Put each newcomer behind its child of a Sequential; numbered children are numbered anew."""
    children = dict(parent._modules)
    renamed, names = sequential_names(tuple(children), set(after), keep_keys)
    parent._modules.clear()
    for child, module in children.items():
        parent._modules[renamed.get(child, child)] = module
        if child in after:
            parent._modules[names[child]] = after[child]


def _require_names(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (name for site in plan.insert_sites for name in site.norms):
        if not isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm):
            raise InvariantError(f"the plan put a BatchNorm at {name}, but it is not there")
