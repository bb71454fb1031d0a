"""Whether batches differ more than chance allows: then their samples come in an order of some meaning."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

_FALSE_ALARMS = 1e-3
"""How often batches that were drawn at random are taken for ordered ones."""
_DRAWS = 200_000
_ROUNDING = 1e-6
"""Of the size of a value: what varies less than this is float32's rounding and no data."""

RUINS = (
    "statistics from batches that training never sees ruin a model. Shuffle the data: "
    "DataLoader(…, shuffle=True)"
)
"""What comes of such batches where each is normalised by itself."""
POOLED = (
    "the new layers hold the statistics of all of them together, and no such batch has those in training. "
    "Shuffle the data: DataLoader(…, shuffle=True)"
)
"""The same where statistics are those of all batches."""


@dataclasses.dataclass
class Grouping:
    """What batches held, seen at one layer: of each sample the mean and the mean square of every channel.

    By batch: how many samples, and their mean (K,); over all batches `within`, the squared distances of
    samples from the mean of their batch.
    """

    counts: list[int] = dataclasses.field(default_factory=list)
    means: list[Tensor] = dataclasses.field(default_factory=list)
    within: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """A batch of values (N, C, *)."""
        wide = values.detach().flatten(2) if values.dim() > 2 else values.detach().unsqueeze(2)
        wide = wide.cpu().double()
        samples = torch.cat([wide.mean(2), wide.square().mean(2)], dim=1)
        mean = samples.mean(0)
        distances = (samples - mean).square().sum(0)
        self.counts.append(len(samples))
        self.means.append(mean)
        self.within = distances if self.within is None else self.within + distances

    def merged(self, other: Grouping) -> Grouping:
        """The batches of both."""
        parts = [part for part in (self.within, other.within) if part is not None]
        within = torch.stack(parts).sum(0) if parts else None
        return Grouping(self.counts + other.counts, self.means + other.means, within)

    def ratio(self) -> tuple[float, float] | None:
        """How widely batches spread, of what samples drawn at random would give; and the most by chance.

        An analysis of variance (Fisher 1925): mean square between batches over mean square within, where the
        share of the variance that lies between batches is the mean of all channels' shares, so that no
        channel with a few large values decides. Channels are not independent of each other, so the bound is
        that of a single one: the quantile of F, found by drawing it. None where there is nothing to tell:
        one batch, or batches of one sample.
        """
        groups, samples = len(self.counts), sum(self.counts)
        if self.within is None or groups < 2 or samples <= groups:
            return None
        counts, means = torch.tensor(self.counts).double(), torch.stack(self.means)
        middle = (counts[:, None] * means).sum(0) / samples
        between = (counts[:, None] * (means - middle).square()).sum(0)
        total = between + self.within
        varies = total > samples * (_ROUNDING * middle).square()
        if not bool(varies.any()):
            return None
        share = float((between[varies] / total[varies]).mean())
        free = groups - 1, samples - groups
        found = share / free[0] / ((1 - share) / free[1]) if share < 1 else math.inf
        drawn = np.random.default_rng(0).f(*free, _DRAWS)
        return found, float(np.quantile(drawn, 1 - _FALSE_ALARMS))

    def told(self, where: str, then: str = RUINS) -> str:
        """The warning, ending in what comes of it; nothing where the batches are as chance makes them."""
        found = self.ratio()
        if found is None or found[0] <= found[1]:
            return ""
        times = "without end" if math.isinf(found[0]) else f"{found[0]:.3g} times"
        return (
            f"warning: the {len(self.counts)} batches differ more than chance allows: at "
            f"{where or 'the model'} their means and squares spread {times} as widely as those of samples "
            f"drawn at random (up to {found[1]:.2g} is chance). Their samples come in an order, such as "
            f"class by class; {then}"
        )
