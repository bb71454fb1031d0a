"""Networks made at random as exported programs, whole and decomposed into core operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.export import Dim, ExportedProgram, export

import bntool
from bntool.runtime.programs import RunnableProgram
from tools.sweeps.random_nets import RandomNet
from tools.sweeps.random_trials import Run, Trial, any_is_wrong, difference, has_norms, inputs_of, outputs_of


def exported(net: RandomNet) -> tuple[ExportedProgram, Sequence[int]]:
    """The program, and the batch sizes that it takes: torch fixes the batch of some networks."""
    example = (inputs_of(net),)
    try:
        return export(net, example, dynamic_shapes=({0: Dim("batch", min=2)},)), (2, 3)
    except Exception:  # noqa: BLE001  whatever stands in the way of an open axis
        return export(net, example), (2,)


def program_trials(net: RandomNet) -> Iterator[Trial]:
    """The network as an exported program."""
    program, batches = exported(net)
    for form, made in (("", program), ("decomposed, ", program.run_decompositions())):
        original = _run(made)

        def error(after: ExportedProgram, original: Run = original) -> float:
            return difference(original, _run(after), net, batches)

        inserted = bntool.insert(made, activations=("any",))
        yield Trial(f"{form}insert", inserted.plan, any_is_wrong(error(inserted.program)))
        back = bntool.fold(inserted.program, check="none")
        yield Trial(f"{form}insert and fold", back.plan, error(back.program))
        if has_norms(net):
            for what, unshare in (("fold", False), ("fold, unshared", True)):
                result = bntool.fold(made, check="none", unshare=unshare)
                yield Trial(f"{form}{what}", result.plan, error(result.program))


def _run(program: ExportedProgram) -> Run:
    runnable = RunnableProgram(program)

    def run(x: Tensor) -> list[Tensor]:
        return outputs_of(runnable, x)

    return run
