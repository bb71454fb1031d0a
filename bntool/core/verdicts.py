"""What a check found: one `Check` for each stage. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bntool.core.showing import Column, Part, Said, Shown, Table

TF32 = "TF32"
"""The `precision` of a row that was run with TF32 on: it tells what that costs, and decides nothing."""


@dataclasses.dataclass(frozen=True)
class Check(Shown):
    """One verdict: `relative` (max |d| / peak of the reference), `noise_floor` and `limit` share a scale.

    The figures are those of the worst output, `worst` (name and index); `ratio` is relative / noise_floor.
    `limit` is what decided; `tolerance` tells where it comes from if not from the noise floor ("rtol 0.01").
    `top1` is None where no output looks like class scores. `precision` is `float64` for the row that proves
    the algebra, `TF32` for one with TF32 on, judged by a limit of its own, empty for the model's own.
    A row that proves nothing has not `passed`; `undecided` tells why, and is empty for any other. `inputs`
    are the shapes of what both models ran on, a batch each.
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
    tolerance: str = ""
    undecided: str = ""
    inputs: tuple[str, ...] = ()

    def on(self, inputs: Iterable[str]) -> Check:
        """The row with the shapes that it ran on."""
        return dataclasses.replace(self, inputs=tuple(inputs))

    @property
    def name(self) -> str:
        """The row's, as the table has it."""
        return f"{self.stage} {self.precision}".strip()

    @property
    def verdict(self) -> str:
        """`passed`, `failed` or `undecided`."""
        return "undecided" if self.undecided else "passed" if self.passed else "failed"

    @property
    def agrees(self) -> bool:
        """Whether nothing lies out of its limit, whatever that proves."""
        return self.passed or (bool(self.undecided) and self.relative <= self.limit)

    @property
    def limit_by(self) -> str:
        """What set the limit: `rtol 0.01` as it was given, or the noise that it comes from."""
        if self.tolerance:
            return self.tolerance
        if not self.limit:
            return "equal bits"
        return {"float64": "rounding in float64", TF32: "rounding in TF32"}.get(self.precision, "noise floor")

    @property
    def figures(self) -> str:
        """How far the worst output lies off and how far it may, for a message."""
        given = f" by {self.tolerance}" if self.tolerance else ""
        return f"relative error {self.relative:.2g}, allowed {self.limit:.2g}{given}"

    @property
    def decides(self) -> bool:
        """Whether the row counts: TF32 is information about this model, not a fault of its export."""
        return self.precision != TF32

    def parts(self) -> Sequence[Part]:
        return checks_parts([self])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a figure that is not finite becomes None."""
        data = dataclasses.asdict(self)
        data["limit_by"] = self.limit_by
        data["worst"] = {"output": self.worst[0], "index": list(self.worst[1])}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def told_limits(checks: Sequence[Check]) -> list[str]:
    """A line for what set the limits, by rows where they differ, and one for rows that prove nothing."""
    by: dict[str, list[str]] = {}
    for check in checks:
        by.setdefault(check.limit_by, []).append(check.name)
    told = [what if len(by) == 1 else f"{what} ({', '.join(rows)})" for what, rows in by.items()]
    nothing = [check.name for check in checks if check.undecided]
    lines = [f"limit by    {', '.join(told)}"] if told else []
    return [*lines, f"undecided   {', '.join(nothing)}: proves nothing on these inputs"] if nothing else lines


def first_failed(checks: Iterable[Check]) -> Check | None:
    """The first row that fails, of those that decide."""
    return next((check for check in checks if check.decides and check.verdict == "failed"), None)


def first_apart(checks: Iterable[Check]) -> Check | None:
    """The first row with anything out of its limit, decided or not: no surgery is kept so."""
    return next((check for check in checks if check.decides and not check.agrees), None)


def nothing_shown(checks: Iterable[Check]) -> Check | None:
    """The first undecided row, where no row has shown anything; None where one has, or none ran."""
    rows = [check for check in checks if check.decides]
    shown = any(not check.undecided for check in rows)
    return None if shown or not rows else rows[0]


_COLUMNS = (
    Column("Check"),
    Column("Ran on", flexible=True),
    Column("Verdict"),
    Column("Max |d|", number=True),
    Column("Relative", number=True),
    Column("its limit", number=True),
    Column("x noise", number=True),
)


def checks_parts(checks: Sequence[Check]) -> Sequence[Part]:
    """The checks as a table that fits 80 columns, with the remarks below.

    "its limit" is that of the relative error, the column before.
    """
    rows = [
        [
            check.name,
            _ran_on(check),
            _verdict(check),
            f"{check.max_abs:.1e}",
            f"{check.relative:.1e}",
            f"{check.limit:.1e}",
            f"{check.ratio:.2f}",
        ]
        for check in checks
    ]
    if not rows:
        return ["nothing was verified"]
    details: dict[str, dict[str, None]] = {}  # each remark once, with the checks that it is about
    for row, check in zip(rows, checks, strict=True):
        if check.detail:
            details.setdefault(check.detail, {})[row[0]] = None
    told = [Said(f"{', '.join(names)}: {detail}") for detail, names in details.items()]
    return [Table(_COLUMNS, rows), *told]


def _verdict(check: Check) -> str:
    if not check.decides:
        return "within" if check.agrees else "beyond"
    return "FAILED" if check.verdict == "failed" else check.verdict


def _ran_on(check: Check) -> str:
    """`torch on cpu`, `ONNX Runtime CPU`, `ONNX Runtime CUDA on cuda:0 (…)`: as the session tells."""
    if not check.provider.endswith("ExecutionProvider"):
        return f"{check.provider} on {check.device}"
    kind = check.provider.removesuffix("ExecutionProvider")
    return f"ONNX Runtime {kind}" + ("" if kind.lower() == check.device else f" on {check.device}")
