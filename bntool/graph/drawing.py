"""Seeded numbers in the place of others: how every example, batch, other size and redraw is drawn.

No other file draws inputs, which `tests/test_architecture.py` holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Draw:
    """Draws tensors one after the other from one seed, always the same.

    Args:
        seed: of the draw.
        mean: of floating numbers.
        spread: of floating numbers, their standard deviation.
    """

    def __init__(self, seed: int = 0, *, mean: float = 0.0, spread: float = 1.0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._mean, self._spread = mean, spread

    def like(self, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Another tensor of that type, and of another `shape` where one is given.

        Floating numbers are normal, integers and truth values resampled from those that there are.
        """
        shape = tensor.shape if shape is None else shape
        if tensor.is_floating_point():
            return self.numbers(shape, tensor.dtype).to(tensor.device)
        if not tensor.numel():
            return tensor.new_zeros(tuple(shape))
        index = torch.randint(tensor.numel(), tuple(shape), generator=self._generator)
        return tensor.cpu().reshape(-1)[index].to(tensor.device)

    def numbers(self, shape: Sequence[int], dtype: torch.dtype, *, below: int = 2) -> Tensor:
        """A tensor of which only the type is known: normal, or whole numbers from 0 to `below` - 1."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.randint(0, below, tuple(shape), generator=self._generator).to(dtype)
        drawn = torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32)
        if (self._mean, self._spread) != (0.0, 1.0):
            drawn = drawn * self._spread + self._mean
        return drawn.to(dtype)
