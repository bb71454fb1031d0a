"""What a benchmark found: how long, how spread, on what it really ran. No torch here.

A difference is claimed only where it was measured. Both models run once a round, one right behind the other,
so that whatever slows the machine slows both; what is looked at is the ratio of the two in each round. The
sign test gives an interval in which its median lies, whatever the noise is like; a difference is claimed
where that interval, at 99.9 %, lies beyond 2 % on one side: less is decided by where memory happens to lie.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

LEAST_ROUNDS = 11
"""Of fewer no interval at 99.9 % can be had: all eleven on one side by chance is 2 in 2,048."""
_CHANCE = 1e-3
_LEAST_DIFFERENCE = 1.02


@dataclasses.dataclass(frozen=True)
class Latency:
    """One model at one batch size: seconds a run, and where it really ran.

    `memory` is the most it held beyond what the process held without it, in bytes, weights included; None
    where this machine does not tell. `note` says what is special about the run.
    """

    name: str
    batch: int
    device: str
    provider: str
    seconds: tuple[float, ...]
    memory: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def middle(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def throughput(self) -> float:
        """Samples a second."""
        return self.batch / self.median

    def to_dict(self) -> dict[str, Any]:
        low, high = self.middle
        return {
            "name": self.name,
            "batch": self.batch,
            "device": self.device,
            "provider": self.provider,
            "median_seconds": self.median,
            "quartiles_seconds": [low, high],
            "rounds": len(self.seconds),
            "samples_per_second": self.throughput,
            "memory_bytes": self.memory,
            "note": self.note,
        }


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model holds, and what it computes for one sample.

    `flops` counts convolutions and matrix products, two for each multiply-add; None where they cannot be.
    """

    name: str
    parameters: int
    flops: int | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def outside_by_chance(rounds: int) -> int | None:
    """How many of so many sorted values may be left out on each side for an interval of their median.

    By the sign test: beyond the value after k that are left out, the median lies with the chance of at most k
    heads in as many tosses. None where even none may be.
    """
    chance, below = 0.0, -1
    while below < rounds:
        chance += 2 * math.comb(rounds, below + 1) / 2**rounds
        if chance > _CHANCE:
            break
        below += 1
    return below if below >= 0 else None


@dataclasses.dataclass(frozen=True)
class Versus:
    """Two models at one batch size: `ratio` is the median of the first over the second, round by round."""

    first: Latency
    second: Latency

    @property
    def ratios(self) -> list[float]:
        """First over second, round by round."""
        return [a / b for a, b in zip(self.first.seconds, self.second.seconds, strict=False)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the median of the ratios lies, but for one chance in a thousand; None for too few rounds."""
        ratios = sorted(self.ratios)
        outside = outside_by_chance(len(ratios))
        return (ratios[outside], ratios[-1 - outside]) if outside is not None and self.comparable else None

    @property
    def comparable(self) -> bool:
        same = self.first.device == self.second.device
        return same and len(self.ratios) >= LEAST_ROUNDS

    @property
    def measurable(self) -> bool:
        if self.interval is None:
            return False
        low, high = self.interval
        return low > _LEAST_DIFFERENCE or high < 1 / _LEAST_DIFFERENCE

    @property
    def verdict(self) -> str:
        batch = f"batch {self.first.batch}"
        if self.first.device != self.second.device:
            return f"{batch}: not compared, they ran on {self.first.device} and {self.second.device}"
        if self.interval is None:
            return f"{batch}: not compared, fewer than {LEAST_ROUNDS} rounds"
        low, high = self.interval
        if not self.measurable:
            names = f"{self.first.name} and {self.second.name}"
            about = f"{self.ratio:.2f} : 1, from {low:.2f} to {high:.2f}"
            return f"{batch}: no measurable difference between {names} ({about})"
        word, faster = "faster", self.ratio
        if faster < 1:
            word, faster, low, high = "slower", 1 / faster, 1 / high, 1 / low
        about = f"{faster:.2f}x {word} than {self.first.name} (from {low:.2f} to {high:.2f})"
        return f"{batch}: {self.second.name} is {about}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.name,
            "second": self.second.name,
            "batch": self.first.batch,
            "ratio": self.ratio if self.comparable else None,
            "interval": None if self.interval is None else list(self.interval),
            "measurable": self.measurable,
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The rows of a benchmark; models are compared in the pairs that belong together."""

    rows: tuple[Latency, ...]
    costs: tuple[Cost, ...]
    pairs: tuple[tuple[str, str], ...]
    threads: int
    notes: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def versus(self) -> list[Versus]:
        by_name = {(row.name, row.batch): row for row in self.rows}
        batches: Sequence[int] = list(dict.fromkeys(row.batch for row in self.rows))
        return [
            Versus(by_name[a, batch], by_name[b, batch])
            for a, b in self.pairs
            for batch in batches
            if (a, batch) in by_name and (b, batch) in by_name
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "costs": [cost.to_dict() for cost in self.costs],
            "comparisons": [versus.to_dict() for versus in self.versus],
            "threads": self.threads,
            "tf32": self.tf32,
            "notes": list(self.notes),
        }
