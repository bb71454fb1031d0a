"""What the public functions are asked, in the words of the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn
from torch.export import ExportedProgram

from bntool.core.errors import UsageError
from bntool.core.options import CheckOptions
from bntool.results.results import SurgeryResult
from bntool.subjects.base import Checking, Subject

CheckLevel = Literal["full", "fast", "none"]
Model = nn.Module | ExportedProgram | str | Path
"""A model of any kind: one in memory, or the name of a file or of code that makes one."""


def names_of(names: Sequence[str], option: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError(f"{option} is a tuple of names, not one string")
    return tuple(names)


def checking_of(level: CheckLevel) -> Checking | None:
    asked = CheckOptions(check=level)
    asked.validate()
    return Checking.of(asked)


def owned(result: SurgeryResult, subject: Subject, share: bool) -> SurgeryResult:
    """The result of a module with tensors of its own, unless it may share them."""
    return dataclasses.replace(result, model=subject.owned(result.model, share=share))
