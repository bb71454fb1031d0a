"""Check the fold of an ONNX file: the file before against the file after, in ONNX Runtime."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bntool.core.errors import CheckFailed, ExportError
from bntool.core.tolerances import (
    BY_NOISE,
    DRAWS,
    EXACT,
    HALF,
    K_NOISE,
    MANY_INTEGERS,
    MOST_INTEGERS,
    Limit,
    Tolerance,
    derived,
    half_the_digits,
    rounding_term,
)
from bntool.core.verdicts import Check
from bntool.graph.drawing import Draw
from bntool.graph.inputs import Inputs
from bntool.runtime.crash_guard import require_survival
from bntool.runtime.onnx_inputs import first_runs, runs_of
from bntool.runtime.onnx_outputs import OutputTraits
from bntool.runtime.onnx_reference import ReferenceRunner
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.runner import FileRunner, Runner
from bntool.verifying.comparing import Outputs, compare
from bntool.verifying.differences import difference
from bntool.verifying.onnx_cutting import node_that


class OnnxReference:
    """What a file computes before a fold, on the inputs `given`, or on seeded ones of several sizes where it
    leaves axes open.

    The limits of a candidate come from the file's `nodes`, from what ONNX Runtime's own optimisations move
    the file by, and from what a rounding of the inputs does (`file_limits`).

    A file that ONNX Runtime refuses runs in ONNX's own reference implementation, before and after.

    Raises `CheckFailed` when the file runs on none of the inputs, `ExportError` when it does not run at all.
    """

    def __init__(
        self,
        path: str | Path,
        nodes: int,
        *,
        count: int = 2,
        seed: int = 0,
        shapes: Mapping[str, Sequence[int | None]] | None = None,
        given: Sequence[Inputs] = (),
    ) -> None:
        runner = opened(path, shapes)
        self.runtime = isinstance(runner, OrtRunner)
        found = runs_of(runner, given) if given else first_runs(runner, count, seed, shapes)
        self.inputs, self.outputs, refused = found.inputs, found.outputs, found.refused
        if not self.inputs:
            raise CheckFailed(
                f"there is nothing to compare: {refused}",
                where=str(path),
                next_step="give a shape that it takes with --input NAME:SHAPE",
            )
        self._path, self._nodes, self._traits = path, nodes, OutputTraits(path)
        self._again = rounded_runs(runner, self.inputs, self._traits)
        del runner  # one session at a time: each holds the weights
        if self.runtime:
            optimised = OrtRunner(path, "cpu", optimize=True)
            self._again.append(Run([optimised.run(inputs) for inputs in self.inputs]))
        self.limits = file_limits(self.outputs, self._again, nodes, self._traits)

    @functools.cached_property
    def redrawn_limits(self) -> dict[str, Limit]:
        """The limits by more draws of the file's rounding: one is one draw, and it may be lucky."""
        runner = opened(self._path)
        draws = [
            run
            for seed in range(1, DRAWS + 1)
            for run in rounded_runs(runner, self.inputs, self._traits, seed)
        ]
        return file_limits(self.outputs, [*self._again, *draws], self._nodes, self._traits)

    def checks(
        self,
        after: str | Path,
        *,
        device: str = "cpu",
        tolerance: Tolerance = BY_NOISE,
    ) -> list[Check]:
        """Two rows: the fold with ONNX Runtime's optimisations off, the runtime with them on.

        A `tolerance` that is asked replaces the limits.

        Raises `DeviceError` when the device is not honoured, `CheckFailed` when the file does not run.
        """
        try:
            if not self.runtime:
                runner = ReferenceRunner(after)
                return [self._row("fold", runner, tolerance, runner.note)]
            rows = [self._row("fold", OrtRunner(after, "cpu", optimize=False), tolerance)]
            served = OrtRunner(after, device, optimize=True)
            return [*rows, self._row("runtime", served, tolerance, served.note)]
        except ExportError as error:
            raise CheckFailed(f"the folded file does not run: {error.what}") from error

    def _row(self, stage: str, runner: FileRunner, tolerance: Tolerance, note: str = "") -> Check:
        sizes = "; ".join(inputs.shapes() for inputs in self.inputs)
        judged = functools.partial(
            compare,
            self.outputs,
            [runner.run(inputs) for inputs in self.inputs],
            stage=stage,
            device=runner.device,
            provider=runner.provider,
            detail="; ".join(filter(None, (f"inputs {sizes}", note))),
            tolerance=tolerance,
        )
        row = judged(self.limits)
        row = row if row.agrees else judged(self.redrawn_limits)
        return row.on(inputs.shapes() for inputs in self.inputs)


def opened(path: str | Path, shapes: Mapping[str, Sequence[int | None]] | None = None) -> FileRunner:
    """What runs the file: ONNX Runtime, or ONNX's own implementation.

    Raises `ExportError` for neither, and where running it on inputs of `shapes` ends ONNX Runtime itself.
    """
    require_survival(path, shapes, node_that)
    try:
        return OrtRunner(path, "cpu", optimize=False)
    except ExportError as error:
        try:
            return ReferenceRunner(path)
        except ExportError:
            raise ExportError(
                f"the file cannot be run, so a fold of it cannot be checked: {error.what}",
                where=str(path),
                next_step="fold it with --check none, and verify the result where it will run",
            ) from error


def check_onnx_unchanged(before: str | Path, after: str | Path, inputs_list: Sequence[Inputs]) -> Check:
    """Two files that compute the same to the last bit, with ONNX Runtime's optimisations off; in ONNX's own
    implementation where ONNX Runtime refuses the first.
    """
    reference = opened(before)
    in_runtime = isinstance(reference, OrtRunner)
    candidate = OrtRunner(after, "cpu", optimize=False) if in_runtime else ReferenceRunner(after)
    fits = [inputs for inputs in inputs_list if reference.accepts(inputs)]
    expected, got = ([runner.run(inputs) for inputs in fits] for runner in (reference, candidate))
    limits = {name: EXACT for outputs in expected for name in outputs}
    return compare(
        expected, got, limits, stage="insert", device=candidate.device, provider=candidate.provider
    )


class Run(NamedTuple):
    """What a file gives again, on inputs that were rounded to numbers `eps` apart; 0 where they were not."""

    outputs: Sequence[Outputs]
    eps: float = 0.0


def rounded_runs(
    runner: Runner, inputs_list: Sequence[Inputs], traits: OutputTraits, seed: int = 0
) -> list[Run]:
    """A run of the file on inputs rounded once, for each of the types that decide how exact an output is."""
    own = max(
        (torch.finfo(t.dtype).eps for t in inputs_list[0].tensors().values() if t.is_floating_point()),
        default=0.0,
    )
    found = {max(eps, own) for eps in traits.eps.values()} or {own}
    return [Run([runner.run(nudged(i, seed, eps)) for i in inputs_list], eps) for eps in sorted(found)]


def nudged(inputs: Inputs, seed: int = 0, eps: float = 0.0) -> Inputs:
    """The same numbers, each rounded once: up or down by half a unit of its last digit, which is seeded.

    With `eps` of a coarser type than theirs, by half a unit of that one's last digit.
    """
    draw = Draw(seed)

    def nudge(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        sign = draw.numbers(tensor.shape, torch.int64) * 2 - 1
        return (tensor.double() * (1 + sign * max(torch.finfo(tensor.dtype).eps, eps))).to(tensor.dtype)

    return inputs.map(nudge)


def file_limits(
    own: Sequence[Outputs],
    again: Iterable[Run],
    nodes: int,
    traits: OutputTraits,
    coarse: float | None = None,
) -> dict[str, Limit]:
    """How far a candidate may be from each output of a file that ran as `own`: `K_NOISE` + 2 times its noise.

    A file has no float64 run of its own to measure its noise with. What stands for it: a walk of one rounding
    for each of its `nodes`, or, where that is more, what other roundings of it (`again`) move the output by.
    What they move by the first half of the digits is undecidable: such a limit would pass all. With `coarse`,
    what the roundings of an arithmetic of that eps may move: what a rounding is carried to grows with it.
    The coarsest type on the way to an output tells how large a rounding is. Of integers it is the share of
    those that fall the other way; by none in thousands, a draw may have missed as much as one.
    """
    runs = list(again)
    limits: dict[str, Limit] = {}
    for name, tensor in own[0].items():
        eps = traits.eps.get(name, 0.0)
        moved = [
            difference(a[name], b[name]).relative
            for run in runs
            if not eps or run.eps <= eps
            for a, b in zip(own, run.outputs, strict=True)
        ]
        if not tensor.is_floating_point():
            limits[name] = _of_integers(moved, min(outputs[name].numel() for outputs in own))
            continue
        eps = max(eps, torch.finfo(tensor.dtype).eps)
        most_of_it = half_the_digits(eps)
        noise = max([rounding_term(eps, nodes) / 2, *(d for d in moved if d < most_of_it)])
        noise *= coarse / eps if coarse else 1.0
        most = max(moved, default=0.0)
        far = f"moves this output by {most:.2g} of its peak" if math.isfinite(most) else "decides this output"
        why = f"rounding alone {far}" if most >= most_of_it else ""
        limits[name] = derived(noise, why, traits.slack.get(name, 0.0))
    return limits


def _of_integers(moved: Sequence[float], count: int) -> Limit:
    """The share of integers that may differ, from the shares that other roundings of the file moved."""
    if any(not math.isfinite(share) for share in moved):
        return Limit(0.0, 0.0, "rounding alone decides this output")
    share = max([*moved, 1 / count if count >= MANY_INTEGERS else 0.0])
    why = f"rounding alone changes {share:.0%} of these integers" if share > MOST_INTEGERS else ""
    return Limit(share, min((K_NOISE + 2) * share, HALF), why)
