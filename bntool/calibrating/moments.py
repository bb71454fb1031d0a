"""Exact per-channel mean and variance over any number of batches.

Moments are float64: two passes over each part of a batch (mean, then squared distances from it), parts
merged by the pairwise formula of Chan, Golub & LeVeque 1983 ("Algorithms for computing the sample
variance"), so that neither the order nor the size of the batches matters beyond float64 rounding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Elements widened to float64 at a time: 32 MiB, whatever the size of the batch."""


@dataclasses.dataclass
class Moments:
    """Per channel: `count` values, their mean, and the sum of squared distances from it, in float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of values (N, C, *) over every axis but the second."""
        axes = (0, *range(2, values.dim()))
        rows = max(1, _CHUNK * values.shape[0] // max(values.numel(), 1))
        total: Moments | None = None
        for part in values.detach().split(rows):
            # MPS has no float64.
            wide = (part.cpu() if part.device.type == "mps" else part).to(torch.float64)
            mean = wide.mean(axes)
            distance = wide - mean.reshape(1, -1, *(1,) * (wide.dim() - 2))
            found = cls(wide.numel() // wide.shape[1], mean, distance.square_().sum(axes))
            total = found if total is None else total.merged(found)
        assert total is not None
        return total

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean.to(self.mean.device) - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2.to(self.m2.device) + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Population variance: what a BatchNorm in train mode divides by."""
        return self.m2 / self.count

    @property
    def unbiased_variance(self) -> Tensor:
        """Sample variance, n/(n − 1) times the population's: what PyTorch keeps in `running_var`."""
        return self.m2 / max(self.count - 1, 1)


@dataclasses.dataclass
class Seen:
    """What one layer read: the moments over all its calls, and how many calls there were."""

    moments: Moments
    calls: int = 1
    dtype: torch.dtype = torch.float32

    def add(self, values: Tensor) -> None:
        self.moments = self.moments.merged(Moments.of(values))
        self.calls += 1

    def merged(self, other: Seen) -> Seen:
        """What both read together."""
        return Seen(self.moments.merged(other.moments), self.calls + other.calls, self.dtype)

    def to(self, device: str) -> Seen:
        moments = self.moments
        moved = Moments(moments.count, moments.mean.to(device), moments.m2.to(device))
        return dataclasses.replace(self, moments=moved)
