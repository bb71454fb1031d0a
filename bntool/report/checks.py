"""Checks as a table, and the comparison that holds several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bntool.core.text import Lines, as_lines
from bntool.core.verdicts import Check, first_failed
from bntool.report.tables import Column, Table, render, wrapped


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several checks; true when one at least has passed, and none failed. Prints itself as a table."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        shown = any(check.decides and check.passed for check in self.checks)
        return shown and first_failed(self.checks) is None

    def to_dict(self) -> dict[str, Any]:
        return {"passed": bool(self), "checks": [check.to_dict() for check in self.checks]}

    def __str__(self) -> str:
        return checks_text(self.checks)


def checks_text(checks: Sequence[Check]) -> Lines:
    """The checks as a table that fits 80 columns, with the remarks below."""
    columns = (
        Column("Check"),
        Column("Ran on", flexible=True),
        Column("Verdict"),
        Column("Max |d|", number=True),
        Column("Relative", number=True),
        Column("x noise", number=True),
        Column("Limit", number=True),
    )
    rows = [
        [
            f"{check.stage} {check.precision}".strip(),
            _ran_on(check),
            _verdict(check),
            f"{check.max_abs:.1e}",
            f"{check.relative:.1e}",
            f"{check.ratio:.2f}",
            f"{check.limit:.1e}",
        ]
        for check in checks
    ]
    if not rows:
        return as_lines("nothing was verified")
    details: dict[str, dict[str, None]] = {}  # each remark once, with the checks that it is about
    for row, check in zip(rows, checks, strict=True):
        if check.detail:
            details.setdefault(check.detail, {})[row[0]] = None
    told = [wrapped(f"{', '.join(names)}: {detail}") for detail, names in details.items()]
    return as_lines(render(Table(columns, rows)), *told)


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
