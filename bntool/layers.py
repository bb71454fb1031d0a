"""The module classes bntool itself puts into a model: a convolution that holds its BatchNorm.

Used only where no stock arrangement fits (form `subclass`). The layer keeps its weight, bias and
attributes under their old names, so that old checkpoints load with `strict=True`.
"""

from __future__ import annotations

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
