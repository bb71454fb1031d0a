"""What a check found: one `Check` for each stage. No torch here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Check:
    """One verdict: `relative` (max |d| / peak of the reference), `noise_floor` and `limit` share a scale.

    The figures are those of the worst output, `worst` (name and index); `ratio` is relative / noise_floor.
    `top1` is None where no output looks like class scores. `precision` is `float64` for the row that proves
    the algebra, empty for the model's own.
    """

    stage: str
    device: str
    provider: str
    passed: bool
    max_abs: float
    relative: float
    rms: float
    cosine: float
    top1: float | None
    noise_floor: float
    ratio: float
    limit: float
    batches: int
    detail: str = ""
    worst: tuple[str, tuple[int, ...]] = ("", ())
    precision: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite becomes None."""
        data = dataclasses.asdict(self)
        data["worst"] = {"output": self.worst[0], "index": list(self.worst[1])}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
