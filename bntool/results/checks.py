"""Checks as text, and the comparison that holds several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bntool.core.showing import Part, Shown
from bntool.core.text import Lines
from bntool.core.verdicts import Check, checks_parts, first_failed
from bntool.results.tables import text_of


@dataclasses.dataclass(frozen=True)
class Comparison(Shown):
    """Several checks; true when one at least has passed, and none failed. Prints itself as a table."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        shown = any(check.decides and check.passed for check in self.checks)
        return shown and first_failed(self.checks) is None

    def to_dict(self) -> dict[str, Any]:
        return {"passed": bool(self), "checks": [check.to_dict() for check in self.checks]}

    def __str__(self) -> str:
        return checks_text(self.checks)

    def parts(self) -> Sequence[Part]:
        return checks_parts(self.checks)


def checks_text(checks: Sequence[Check]) -> Lines:
    """The checks as a table, with the remarks below."""
    return text_of(checks_parts(checks))
