"""What a check found: one `Check` for each stage, and the `Comparison` that holds them. No torch here."""

from __future__ import annotations

import dataclasses
import io
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several checks; true when there is at least one and all passed. Prints itself as a table."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": bool(self), "checks": [check.to_dict() for check in self.checks]}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("stage", "device", "provider", "verdict", "max |d|", "relative", "x noise", "limit")
        for check in self.checks:
            verdict = "passed" if check.passed else "FAILED"
            figures = (f"{check.max_abs:.2g}", f"{check.relative:.2g}", f"{check.ratio:.2g}")
            stage = f"{check.stage} {check.precision}".strip()
            table.add_row(stage, check.device, check.provider, verdict, *figures, f"{check.limit:.2g}")
        text = io.StringIO()
        console = Console(file=text, width=110)
        console.print(table if self.checks else "nothing was compared")
        for check in self.checks:
            if check.detail:
                console.print(f"{check.stage}: {check.detail}", markup=False, highlight=False)
        return text.getvalue().rstrip()
