"""BatchNorm layers that stay frozen: their statistics do not move in training, whatever `model.train()` says.

A frozen layer is the stock layer with one method changed: same parameters, buffers and keys, so that
checkpoints go in and out, and folding takes it as it takes the stock layer.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn


class FrozenNorm(nn.Module):
    """Mixin: the layer itself is always in eval mode; its children (dropout, activation) follow `train()`."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.training = False
        return self


class FrozenBatchNorm1d(FrozenNorm, nn.BatchNorm1d):
    """A BatchNorm1d that normalises (N, C) or (N, C, L) with its stored statistics, in training too."""


class FrozenBatchNorm2d(FrozenNorm, nn.BatchNorm2d):
    """A BatchNorm2d that normalises (N, C, H, W) with its stored statistics, in training too."""


class FrozenBatchNorm3d(FrozenNorm, nn.BatchNorm3d):
    """A BatchNorm3d that normalises (N, C, D, H, W) with its stored statistics, in training too."""


class FrozenSyncBatchNorm(FrozenNorm, nn.SyncBatchNorm):
    """A SyncBatchNorm that normalises (N, C, *) with its stored statistics, in training too."""


_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_TIMM_HOME = "timm.layers.norm_act"
_TIMM = {
    "BatchNormAct2d": "FrozenTimmBatchNormAct2d",
    "SyncBatchNormAct": "FrozenTimmSyncBatchNormAct",
}


def __getattr__(name: str) -> Any:
    """The frozen classes over timm's layers, made when first asked for: timm is optional."""
    stock = next((stock for stock, frozen in _TIMM.items() if frozen == name), None)
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module(_TIMM_HOME), stock)
    made = type(name, (FrozenNorm, base), {"__module__": __name__, "__doc__": f"A frozen timm {stock}."})
    return globals().setdefault(name, made)


def frozen_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The frozen class that stands for a BatchNorm class; None where there is none (a user's own class)."""
    if issubclass(cls, FrozenNorm):
        return cls
    if cls in _STOCK:
        return _STOCK[cls]
    if cls.__module__ == _TIMM_HOME and cls.__qualname__ in _TIMM:
        found: type[nn.Module] = __getattr__(_TIMM[cls.__qualname__])
        return found
    return None


def freeze_layer(layer: nn.Module) -> None:
    """Freeze one BatchNorm where it stands: statistics fixed, γ and β without gradient.

    Raises `TypeError` for a class that `frozen_class` does not know.
    """
    frozen = frozen_class(type(layer))
    if frozen is None:
        raise TypeError(f"{type(layer).__name__} has no frozen form")
    layer.__class__ = frozen
    layer.training = False
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            parameter.requires_grad_(False)
