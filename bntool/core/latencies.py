"""What a benchmark found: how long, how spread, on what it really ran. No torch here.

A difference is claimed only where it was measured: where the middle halves of the two samples (the
interquartile ranges) do not overlap. With seven rounds or more, the chance of that for two models of equal
speed is below one in a thousand.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

LEAST_ROUNDS = 7


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


@dataclasses.dataclass(frozen=True)
class Versus:
    """Two models at one batch size: `ratio` is the first's median over the second's."""

    first: Latency
    second: Latency

    @property
    def ratio(self) -> float:
        return self.first.median / self.second.median

    @property
    def comparable(self) -> bool:
        same = self.first.device == self.second.device
        return same and min(len(self.first.seconds), len(self.second.seconds)) >= LEAST_ROUNDS

    @property
    def measurable(self) -> bool:
        (low_a, high_a), (low_b, high_b) = self.first.middle, self.second.middle
        return self.comparable and (high_a < low_b or high_b < low_a)

    @property
    def verdict(self) -> str:
        batch = f"batch {self.first.batch}"
        if self.first.device != self.second.device:
            return f"{batch}: not compared, they ran on {self.first.device} and {self.second.device}"
        if not self.comparable:
            return f"{batch}: not compared, fewer than {LEAST_ROUNDS} rounds"
        if not self.measurable:
            names = f"{self.first.name} and {self.second.name}"
            return f"{batch}: no measurable difference between {names} (medians {self.ratio:.2f} : 1)"
        faster = self.ratio if self.ratio > 1 else 1 / self.ratio
        word = "faster" if self.ratio > 1 else "slower"
        return f"{batch}: {self.second.name} is {faster:.2f}x {word} than {self.first.name}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.name,
            "second": self.second.name,
            "batch": self.first.batch,
            "ratio": self.ratio if self.comparable else None,
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
