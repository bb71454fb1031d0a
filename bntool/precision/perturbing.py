"""A model moved by its own rounding, to see how far it carries it: one more draw of the same noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bntool.observe.stand_in import cast, own_copy

_SHARE = 1 / 12
"""An error spread evenly over half a last place to either side has the variance ulp^2 / 12: so has a number
that moves by a whole last place once in twelve times."""


def shaken_copy(model: nn.Module, eps: float, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model (in `dtype`) in which one stored number in twelve has moved by one last place.

    `eps` is that of the type whose rounding is drawn. Storing a weight anew, as a fold does, is an error of
    that variance (Monte Carlo arithmetic: Parker, *Monte Carlo Arithmetic*, 1997). Whatever keeps a model
    from being copied is raised.
    """
    shaken = cast(own_copy(model), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*shaken.parameters(), *shaken.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(_moved(tensor, eps, generator))
    return shaken


def _moved(tensor: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    exact = tensor.to("cpu", torch.float64)
    draw = torch.rand(tensor.shape, generator=generator)
    step = (draw < _SHARE / 2).double() - (draw > 1 - _SHARE / 2).double()
    # x = mantissa * 2^k with the mantissa in [1/2, 1): its last place is eps * 2^(k - 1), and none for 0.
    power = (exact / torch.frexp(exact).mantissa).nan_to_num(0.0, 0.0, 0.0)
    return exact + step * power * (eps / 2)
