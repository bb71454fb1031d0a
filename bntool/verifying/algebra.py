"""The algebra of a surgery: redone in float64, far below any rounding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from bntool.core.errors import BntoolError, CheckFailed
from bntool.core.tolerances import ALGEBRA, Limit
from bntool.core.verdicts import Check
from bntool.graph.inputs import Inputs
from bntool.runtime.libraries import first_line
from bntool.verifying.comparing import Outputs, compare
from bntool.verifying.conditions import Progress
from bntool.verifying.differences import difference
from bntool.verifying.float64 import Unrounded, run_float64
from bntool.verifying.reference import Reference


@dataclasses.dataclass(frozen=True)
class Redone:
    """A surgery redone on the model in float64, to be held to the original's own float64 runs.

    Args:
        candidate: the model after it.
        elsewhere: a reference on other inputs than the candidate in its own precision runs on.
    """

    candidate: nn.Module | Unrounded
    elsewhere: Reference | None = None

    def check(
        self, reference: Reference, stage: str, say: Progress, changed_parts: Collection[str] = ()
    ) -> Check | None:
        """The row that proves the algebra, elsewhere or on the inputs of the reference.

        None where the original has no float64 run. Raises `CheckFailed` when the candidate does not run.
        """
        # One input settles algebra. The second, of two examples, also tells a batch axis from a channel axis.
        chosen = slice(1, 2) if self.elsewhere is None and len(reference.inputs) > 1 else slice(None)
        found = self.elsewhere.decidable() if self.elsewhere is not None else reference
        return self.check_on(found, stage, say, changed_parts, chosen)

    def check_on(
        self,
        reference: Reference,
        stage: str,
        say: Progress,
        changed_parts: Collection[str] = (),
        chosen: slice = slice(None),
    ) -> Check | None:
        """The same row on the `chosen` inputs of a reference."""
        if reference.exact is None:
            return None
        say("checking the algebra in float64")
        changed = changed_parts if reference.parts else ()
        on = reference.algebra[chosen]
        row = _judged(reference, self.candidate, stage, changed, on)
        if not row.agrees and isinstance(self.candidate, Unrounded) and self.candidate.numbers:
            # the numbers may have gone another way than by the tensors that stand for them
            row = _judged(reference, self.candidate.copy(), stage, changed, on)
        return dataclasses.replace(row, precision="float64").on(inputs.shapes() for inputs, _ in on)


def _judged(
    reference: Reference,
    candidate: nn.Module | Unrounded,
    stage: str,
    changed: Collection[str],
    on: Sequence[tuple[Inputs, Outputs]],
) -> Check:
    inputs, expected = zip(*on, strict=True)
    exact = without(expected, changed)
    try:
        runs, _ = run_float64(candidate, inputs, parts=reference.parts)
        outputs = without(runs, changed)
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise does_not_run(stage, error) from error
    limits = {name: ALGEBRA for names in exact for name in names}
    detail = ""
    if reference.narrowed:
        # Where a model narrows inside, one more digit of input moves the narrow rounding: own noise rules.
        # What rounding decides is then told by the parts that come before the decision.
        noisy = {name: reference.limits[name] for name in limits}
        limits = {name: limit for name, limit in noisy.items() if not limit.undecidable} or noisy
        exact = [{n: t for n, t in one.items() if n in limits} for one in exact]
        outputs = [{n: t for n, t in one.items() if n in limits} for one in outputs]
        detail = "in float64 the model narrows inside, so its own noise is the limit"
    judged = functools.partial(compare, exact, outputs, stage=stage, device="cpu", provider="torch")
    row = judged(limits, detail=detail)
    if not row.agrees and not reference.narrowed and reference.exact_limits:
        row = judged(reference.exact_limits, detail="held to the model's own rounding in float64")
    return row


def left_to_algebra(
    expected: Sequence[Outputs], got: Sequence[Outputs], limits: Mapping[str, Limit]
) -> dict[str, str]:
    """Outputs that are there but out of a limit that the model's own rounding makes meaningless, and why."""
    return {
        name: limit.undecidable
        for name, limit in limits.items()
        if limit.undecidable
        and all(name in outputs for outputs in got)
        and any(
            not difference(ref[name], out[name]).relative <= limit.limit
            for ref, out in zip(expected, got, strict=True)
            if name in ref
        )
    }


def without(runs: Sequence[Outputs], parts: Collection[str]) -> list[Outputs]:
    """The outputs of each run, less what these children of the model returned."""
    return [{n: t for n, t in outputs.items() if n.partition(".")[0] not in parts} for outputs in runs]


def does_not_run(stage: str, error: Exception) -> CheckFailed:
    """What is raised where a candidate fails on inputs that the original takes."""
    return CheckFailed(
        f"the model after {stage} does not run: {type(error).__name__}: {first_line(error)}",
        next_step="report this to bntool; --exclude the layer it names to go on",
    )
