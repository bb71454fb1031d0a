"""What planners must know of a module's class, told by name so that no optional package is imported."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from bntool.core.errors import UsageError
from bntool.core.refusals import refused, unknown

_PLAIN_BIAS_OWNERS = (
    "torch.nn.modules.conv.",
    "torch.nn.modules.linear.",
    "timm.layers.",
    "torchvision.ops.",
    "bntool.layers.",
)
"""Packages whose convolution and linear forwards hand `self.bias` to the operator."""

_FUNCTIONAL_BN = {
    # class that owns the forward -> whether a non-identity activation follows the norm inside it
    "torch.nn.modules.batchnorm._BatchNorm": False,
    "torch.nn.modules.batchnorm.SyncBatchNorm": False,
    "timm.layers.norm_act.BatchNormAct2d": True,
    "timm.layers.norm_act.SyncBatchNormAct": True,
}
_DECOMPOSED_BN = {
    "torchvision.ops.misc.FrozenBatchNorm2d": False,
    "timm.layers.norm_act.FrozenBatchNormAct2d": True,
}
_KNOWN_BN = {**_FUNCTIONAL_BN, **_DECOMPOSED_BN}


_Answer = TypeVar("_Answer")


def once_per_class(ask: Callable[[type], _Answer]) -> Callable[[type], _Answer]:
    """Remember the answer for each class."""
    known: dict[type, _Answer] = {}

    @functools.wraps(ask)
    def answer(cls: type) -> _Answer:
        if cls not in known:
            known[cls] = ask(cls)
        return known[cls]

    return answer


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, in the order of `modules()`, which takes as many steps for each as it lies deep."""
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        waiting += reversed(module._modules.values())


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def forward_owner(cls: type, method: str = "forward") -> str:
    """The class whose `forward` an instance of `cls` runs; empty where it has none."""
    for base in cls.__mro__:
        if method in vars(base):
            return class_name(base)
    return ""


@once_per_class
def is_batch_norm_class(cls: type) -> bool:
    """Whether the class is a BatchNorm by inheritance, whatever its forward does."""
    names = {class_name(base) for base in cls.__mro__}
    return issubclass(cls, nn.modules.batchnorm._BatchNorm) or not names.isdisjoint(_KNOWN_BN)


@once_per_class
def has_known_forward(cls: type) -> bool:
    """Whether the BatchNorm's forward is one we know: the norm, then at most its own activation."""
    return forward_owner(cls) in _KNOWN_BN


@once_per_class
def is_decomposed(cls: type) -> bool:
    """Whether the forward computes the norm from elementary ops instead of one batch_norm."""
    return forward_owner(cls) in _DECOMPOSED_BN


@once_per_class
def has_activation(cls: type) -> bool:
    """Whether the forward applies dropout and an activation of its own after the norm."""
    return _KNOWN_BN.get(forward_owner(cls), False)


@once_per_class
def role_of(cls: type) -> str:
    """The role of a module class, as `graph.Module.role` names it."""
    if issubclass(cls, torch.jit.ScriptModule):
        return "scripted"
    if is_batch_norm_class(cls):
        if not has_known_forward(cls):
            return "custom_norm"
        return "norm_act" if has_activation(cls) else "norm"
    if issubclass(cls, nn.modules.conv._ConvNd):
        return "conv"
    if issubclass(cls, nn.Linear):
        return "linear"
    if cls is nn.Identity:
        return "identity"
    if issubclass(cls, nn.Sequential) and forward_owner(cls) == "torch.nn.modules.container.Sequential":
        return "sequential"
    return ""


@once_per_class
def uses_plain_bias(cls: type) -> bool:
    """Whether the forward of a convolution or linear class is known to use `self.bias`."""
    owners = (forward_owner(cls), forward_owner(cls, "_conv_forward"))
    return all(owner.startswith(_PLAIN_BIAS_OWNERS) for owner in owners if owner)


def require_module(model: Any, what: str) -> None:
    """Refuse what has no Python of its own; `what` bntool would do with it, in a word.

    Raises:
        UsageError: it is TorchScript, or no module.
    """
    if isinstance(model, str | Path):
        step = "load a file with bntool.load(path).model"
        raise UsageError(f"model is a {type(model).__name__}, not an nn.Module", next_step=step)
    kinds = {torch.jit.ScriptModule: "script", ExportedProgram: "program"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(model, cls)), "")
    if kind:
        raise refused(kind, what, getattr(model, "original_name", "") or type(model).__name__)
    if not isinstance(model, nn.Module):
        raise unknown(model)


def signature_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter, then every buffer, by its first qualified name, with its shape."""
    seen: set[int] = set()
    signature: dict[str, tuple[int, ...]] = {}
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                signature[name] = tuple(tensor.shape)
    return signature
