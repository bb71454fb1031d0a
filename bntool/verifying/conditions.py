"""Under what a candidate is run, and by what it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bntool.core.tolerances import BY_NOISE, Tolerance

Progress = Callable[[str], None]


def silent(_: str) -> None:
    """Tell nobody."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Where a candidate runs, how often, and what it may differ by.

    Args:
        device: `cpu`, `cuda`, what else the runner knows, or `auto` where it is ONNX Runtime.
        tolerance: what the user allows in place of the noise floor.
        twice: whether it runs again on one input, which tells whether it repeats itself.
        tf32: whether a row with TF32 on is added to those of an ONNX file.
        progress: is told what is done at the moment.
    """

    device: str = "cpu"
    tolerance: Tolerance = BY_NOISE
    twice: bool = False
    tf32: bool = False
    progress: Progress = silent


DEFAULT = Conditions()
"""On the CPU, judged by the noise floor."""
