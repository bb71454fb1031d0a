"""The processes that train together."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class World:
    """One process that trains alone: rank 0 of 1, whose sums are the sums over all ranks."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of the sample numbers of a batch."""
        return batch[self.rank :: self.size]

    def reduce(self, sums: Tensor) -> Tensor:
        """Sums over the samples of this rank -> sums over those of all ranks."""
        return sums
