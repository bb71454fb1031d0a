"""The module classes bntool itself puts into a model, where no stock arrangement fits.

A convolution that holds its BatchNorm (form `subclass`) keeps its weight, bias and attributes under their
old names, so that old checkpoints load with `strict=True`. A layer that runs several times in a forward
gets a BatchNorm for each of its calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class _NormedForward(nn.Module):
    """Mixin: the layer's own forward, then `self.bn`. Old checkpoints without `bn.*` keys load."""

    bn: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.bn(super().forward(*args, **kwargs))
        return out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint from before the insertion has no `bn.*`: the BatchNorm keeps what it holds."""
        own = f"{prefix}bn."
        if not any(key.startswith(own) for key in state_dict):
            for name, tensor in self.bn.state_dict(prefix=own).items():
                state_dict[name] = tensor
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ConvBN1d(_NormedForward, nn.Conv1d):
    """A Conv1d whose output goes through its child `bn`. weight (out, in/groups, k)."""


class ConvBN2d(_NormedForward, nn.Conv2d):
    """A Conv2d whose output goes through its child `bn`. weight (out, in/groups, kh, kw)."""


class ConvBN3d(_NormedForward, nn.Conv3d):
    """A Conv3d whose output goes through its child `bn`. weight (out, in/groups, kd, kh, kw)."""


class ConvTransposeBN1d(_NormedForward, nn.ConvTranspose1d):
    """A ConvTranspose1d whose output goes through its child `bn`. weight (in, out/groups, k)."""


class ConvTransposeBN2d(_NormedForward, nn.ConvTranspose2d):
    """A ConvTranspose2d whose output goes through its child `bn`. weight (in, out/groups, kh, kw)."""


class ConvTransposeBN3d(_NormedForward, nn.ConvTranspose3d):
    """A ConvTranspose3d whose output goes through its child `bn`. weight (in, out/groups, kd, kh, kw)."""


class LinearBN(_NormedForward, nn.Linear):
    """A Linear whose (N, C) output goes through its child `bn`. weight (out, in)."""


NORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvBN1d,
    nn.Conv2d: ConvBN2d,
    nn.Conv3d: ConvBN3d,
    nn.ConvTranspose1d: ConvTransposeBN1d,
    nn.ConvTranspose2d: ConvTransposeBN2d,
    nn.ConvTranspose3d: ConvTransposeBN3d,
    nn.Linear: LinearBN,
}
"""The stock class -> the class that holds a BatchNorm."""


class BatchNormPerCall(nn.ModuleList):
    """As many BatchNorms as the layer before it has calls in one forward; the i-th call goes to the i-th.

    Every forward of the whole model must make all of these calls: `count_calls_anew` lets each begin with the
    first, so that one that was cut short by an error does not shift those after it.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        super().__init__(norms)
        self.call = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.call >= len(self):
            raise RuntimeError(
                f"a layer ran more than {len(self)} times in one forward; it has no BatchNorm for more calls"
            )
        norm = self[self.call]
        self.call += 1
        out: Tensor = norm(x)
        return out


class StartOfForward:
    """A forward pre-hook of the whole model: the next call of every layer is its first."""

    __slots__ = ()

    def __call__(self, model: nn.Module, _args: Any) -> None:
        for module in model.modules():
            if isinstance(module, BatchNormPerCall):
                module.call = 0


def count_calls_anew(model: nn.Module) -> None:
    """Let the calls of repeated layers be counted from the start of each forward of `model`."""
    if not any(isinstance(hook, StartOfForward) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(StartOfForward())


def has_foreign_hook(hooks: Any) -> bool:
    """Whether one of a module's registries of hooks (or None) holds a hook that is not bntool's own."""
    if not hooks:
        return False
    return not isinstance(hooks, dict) or any(type(hook) is not StartOfForward for hook in hooks.values())
