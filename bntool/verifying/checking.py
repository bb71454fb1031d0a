"""A model before and after surgery, both run by torch: in its own precision, and in float64.

All is judged against the original's own float64 run, and no model runs twice on the same inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from bntool.core.errors import BntoolError
from bntool.core.tolerances import Limit, Tolerance
from bntool.core.verdicts import Check
from bntool.graph.inputs import Inputs
from bntool.runtime.runner import Runner
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.algebra import Redone, does_not_run, left_to_algebra, without
from bntool.verifying.comparing import Outputs, compare
from bntool.verifying.conditions import DEFAULT, Conditions
from bntool.verifying.differences import difference
from bntool.verifying.reference import Reference


def check_surgery(
    reference: Reference,
    candidate: nn.Module,
    *,
    stage: str,
    redone: Redone | None = None,
    changed_parts: Collection[str] = (),
    how: Conditions = DEFAULT,
) -> list[Check]:
    """Compare a model before and after surgery, both in eval mode: a row in its own precision, and with
    `redone` a second row that proves the algebra. `changed_parts` are children of the model that return
    something else after the surgery, as they should: where parts are compared, they are left out.

    Raises `CheckFailed` when there is nothing to compare or the candidate does not run.
    """
    rows = _rows_of(reference, candidate, stage, redone, changed_parts, how)
    ran_on = [inputs.shapes() for inputs in reference.inputs]
    return [row if row.inputs else row.on(ran_on) for row in rows]


def _judged(
    expected: Sequence[Outputs],
    got: Sequence[Outputs],
    algebra: Check | None,
    runner: Runner,
    stage: str,
    remarks: Sequence[str],
    tolerance: Tolerance,
    limits: Mapping[str, Limit],
) -> list[Check]:
    """The row in the model's own precision, less what its rounding decides, and that of the algebra."""
    unsure = left_to_algebra(expected, got, limits) if algebra is not None else {}
    if algebra is not None and unsure.keys() >= limits.keys():
        reasons = "; ".join(f"{name}: {why}" for name, why in unsure.items())
        return [dataclasses.replace(algebra, detail="; ".join(filter(None, (algebra.detail, reasons))))]
    sure = [[{n: t for n, t in run.items() if n not in unsure} for run in runs] for runs in (expected, got)]
    row = compare(
        sure[0],
        sure[1],
        limits,
        stage=stage,
        device=runner.device,
        provider=runner.provider,
        detail="; ".join([*remarks, *(f"{n}: {why}, decided in float64" for n, why in unsure.items())]),
        tolerance=tolerance,
    )
    return [row] if algebra is None else [row, algebra]


def _rows_of(
    reference: Reference,
    candidate: nn.Module,
    stage: str,
    redone: Redone | None,
    changed_parts: Collection[str],
    how: Conditions,
) -> list[Check]:
    if reference.floor is not None and not how.twice and not how.tolerance.is_asked:
        rows = _by_floor(reference, reference.floor, candidate, redone, stage, how)
        if all(row.passed for row in rows):
            return rows
    reference = reference.decidable()
    runner = TorchRunner(candidate, how.device, parts=reference.parts)
    how.progress("running the candidate")
    changed = changed_parts if reference.parts else ()
    got = without(_run_all(runner, reference.inputs, stage), changed)
    remarks = list(reference.notes)
    if how.twice:
        (again,) = without(_run_all(runner, reference.inputs[:1], stage), changed)
        remarks.append(repeated(got[0], again))
    remarks += [note for note in runner.notes if note not in reference.notes]
    algebra = None if redone is None else redone.check(reference, stage, how.progress, changed_parts)
    expected = without(reference.outputs, changed)
    compared = functools.partial(_judged, expected, got, algebra, runner, stage, remarks, how.tolerance)

    def judged(limits: Mapping[str, Limit]) -> list[Check]:
        return compared({n: limit for n, limit in limits.items() if n.partition(".")[0] not in changed})

    rows = judged(reference.limits)
    settled = rows[0].agrees or (algebra is not None and not algebra.agrees)
    return rows if settled or how.tolerance.is_asked else judged(reference.redrawn_limits)


def _by_floor(
    reference: Reference,
    floor: Reference,
    candidate: nn.Module,
    redone: Redone | None,
    stage: str,
    how: Conditions,
) -> list[Check]:
    """The rows by what the original's rounding does on smaller inputs: the candidate against the original's
    own runs here, and the algebra there.
    """
    runner = TorchRunner(candidate, how.device)
    algebra = None if redone is None else redone.check_on(floor, stage, how.progress)
    how.progress("running the candidate")
    got = _run_all(runner, reference.inputs, stage)
    remarks = [*reference.notes, *(note for note in runner.notes if note not in reference.notes)]
    own = functools.partial(_judged, reference.own, got, algebra, runner, stage, remarks, how.tolerance)
    return own(floor.limits)


def seeded_batches(example: Inputs, batches: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Inputs]:
    """Seeded random inputs like `example` for several batch sizes; nested ones keep their shapes."""
    redrawn = [example.redrawn(seed + batch) for batch in batches if example.nested]
    return redrawn or [example.rebatched(batch, seed + batch) for batch in batches]


def _run_all(runner: Runner, inputs_list: Sequence[Inputs], stage: str) -> list[dict[str, Tensor]]:
    try:
        return [runner.run(inputs) for inputs in inputs_list]
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise does_not_run(stage, error) from error


def repeated(first: Outputs, again: Outputs) -> str:
    """Whether a second run on the same inputs gives the same bits, or what it differs by."""
    worst = max((difference(first[name], again.get(name)).relative for name in first), default=0.0)
    return f"a second run differs by {worst:.2g} of the peak" if worst else "a second run gives the same bits"
