"""Insert BatchNorm into an exported program: observe, plan, apply, check."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from bntool.errors import CheckFailed, UsageError
from bntool.inputs import Inputs
from bntool.inserting import InsertOptions, plan_insert_nodes
from bntool.insertion import check_unchanged
from bntool.observe.exported_program import observe_program
from bntool.program_folding import ProgramResult, RunnableProgram, example_inputs_of
from bntool.surgery.insert_program import apply_insert_program


def insert_program(
    program: ExportedProgram, options: InsertOptions | None = None, *, example_inputs: Any = None
) -> ProgramResult:
    """Put a BatchNorm between every convolution of an exported program and its activation.

    Identity-initialised: the eval output is the same to the last bit, proved by running both. A program is
    exported for eval or training mode, and the newcomers are in eval mode. The argument is not changed.

    Raises:
        UsageError: an option that only modules can carry out, or an init other than identity.
        CheckFailed: the output is not the same.
    """
    options = options or InsertOptions()
    if options.init != "identity":
        raise UsageError("a program takes identity-initialised BatchNorms only")
    observed = observe_program(program)
    plan = plan_insert_nodes(observed.graph, options)
    if not plan:
        return ProgramResult(program, plan)
    modified = apply_insert_program(observed, plan)
    inputs = Inputs.of(example_inputs) if example_inputs is not None else example_inputs_of(program)
    row = check_unchanged(RunnableProgram(program), RunnableProgram(modified), inputs, full=False)
    if not row.passed:
        raise CheckFailed("the insertion changes the output", next_step="please report this program")
    return ProgramResult(modified, plan, (row,))
