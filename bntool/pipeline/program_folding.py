"""A surgery on an exported program, for those who have its graph in hand."""

from __future__ import annotations

from typing import Any, Literal

from torch.export import ExportedProgram

from bntool.core.options import FoldOptions, InsertOptions
from bntool.core.plan import Plan
from bntool.core.tolerances import Tolerance
from bntool.observe.exported_program import ProgramObservation
from bntool.pipeline.surgeries import fold, insert
from bntool.results.results import SurgeryResult
from bntool.subjects.base import Checking
from bntool.subjects.program import ProgramSubject


def fold_program(
    program: ExportedProgram,
    *,
    example_inputs: Any = None,
    check: Literal["full", "fast", "none"] = "fast",
    atol: float | None = None,
    rtol: float | None = None,
    **options: Any,
) -> SurgeryResult:
    """`bntool.fold` of a program, with a tolerance; `options` are those of `FoldOptions`."""
    subject = ProgramSubject(program, example_inputs)
    proof = None
    if check != "none":
        proof = subject.proof(Checking(full=check == "full", tolerance=Tolerance(atol, rtol)))
    return fold(subject, FoldOptions.of(options), proof)[0]


def insert_program(
    program: ExportedProgram, options: InsertOptions | None = None, *, example_inputs: Any = None
) -> SurgeryResult:
    """`bntool.insert` into a program."""
    return insert(ProgramSubject(program, example_inputs), options or InsertOptions(), Checking())[0]


def plan_fold_program(program: ExportedProgram, **options: Any) -> tuple[Plan, ProgramObservation]:
    """A verdict for every BatchNorm of the program, and the observation it was planned on."""
    subject = ProgramSubject(program)
    return subject.plan_fold(FoldOptions.of(options)), subject.observed
