"""Two ONNX files against each other, or one against itself: at every optimisation level and provider."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bntool.core.errors import CheckFailed, ExportError
from bntool.core.tolerances import BY_NOISE, Limit, Tolerance
from bntool.core.verdicts import TF32, Check
from bntool.graph.inputs import Inputs
from bntool.precision import casting
from bntool.runtime.onnx_inputs import SIDES, drawn_inputs
from bntool.runtime.onnx_outputs import OutputTraits
from bntool.runtime.onnx_reference import ReferenceRunner
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.providers import why_no_cuda
from bntool.verifying.blaming import where_it_ran
from bntool.verifying.checking import repeated
from bntool.verifying.comparing import compare
from bntool.verifying.conditions import Conditions
from bntool.verifying.export_checking import named_as
from bntool.verifying.onnx_checking import file_limits, opened, rounded_runs
from bntool.verifying.onnx_cutting import OnnxGraph
from bntool.verifying.tf32 import no_tf32

AUTO = Conditions("auto")
"""On CUDA where that is, judged by the noise floor."""

LEVELS: Mapping[str, bool | str] = {"basic": "basic", "extended": "extended", "all": True}
"""ONNX Runtime's optimisation levels by the names of its documentation; the stage of a check of one file."""


def check_files(
    reference: str | Path,
    candidate: str | Path,
    inputs_list: Sequence[Inputs],
    how: Conditions = AUTO,
) -> list[Check]:
    """Two rows: both files as they are written, and the candidate with optimisations on, on `device`. One
    where ONNX Runtime refuses the reference: both run in ONNX's own implementation.

    With `how.tf32` one more with TF32 on, judged by a walk of TF32's roundings, or why there is none.
    Raises `ExportError` where ONNX Runtime refuses a file, `DeviceError` where it refuses the device.
    """
    runs = _Runs(reference, inputs_list)
    if not runs.in_runtime:
        return [runs.row("verify", ReferenceRunner(candidate), how.tolerance)]
    rows = []
    for stage, optimize, where in (("verify", False, "cpu"), ("runtime", True, how.device)):
        rows.append(runs.row(stage, OrtRunner(candidate, where, optimize=optimize), how.tolerance))
    return runs.with_tf32(rows, candidate) if how.tf32 else rows


def check_itself(
    path: str | Path,
    inputs_list: Sequence[Inputs],
    how: Conditions = AUTO,
) -> list[Check]:
    """A file against itself without optimisations: a row for each level, on the CPU and on CUDA where it is.

    `how.tf32` as in `check_files`. Raises as `check_files`.
    """
    runs = _Runs(path, inputs_list)
    devices = ["cpu"] if how.device in ("auto", "cpu") else [how.device]
    reason = why_no_cuda() if how.device == "auto" else ""
    if how.device == "auto" and not reason:
        devices.append("cuda")
    rows = [
        runs.row(level, OrtRunner(path, where, optimize=optimize), how.tolerance)
        for where in devices
        for level, optimize in LEVELS.items()
    ]
    if reason:
        rows[-1] = dataclasses.replace(rows[-1], detail=f"{rows[-1].detail}; not run on CUDA: {reason}")
    return runs.with_tf32(rows, path) if how.tf32 else rows


def seeded_file_inputs(
    path: str | Path,
    batches: Iterable[int],
    seed: int = 0,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> list[Inputs]:
    """Seeded inputs of the shapes that a file declares, or of `shapes`; of open axes, sizes that it takes.

    Raises `CheckFailed` where the file runs on none of them.
    """
    runner = opened(path, shapes)
    found: list[Inputs] = []
    refused = ""
    for batch in batches:
        for side in SIDES:
            inputs = drawn_inputs(runner, batch, side, seed + batch, shapes or {})
            try:
                runner.run(inputs)
            except ExportError as error:
                refused = refused or error.what
                continue
            found.append(inputs)
            break
    if not found:
        raise CheckFailed(
            f"there is nothing to compare: {refused}",
            where=str(path),
            next_step="give a shape that it takes with --input NAME:SHAPE, or data with --inputs FILE",
        )
    return found


class _Runs:
    """What the reference file gives, unoptimised on the CPU, and how far a candidate may be from it."""

    def __init__(self, path: str | Path, inputs_list: Sequence[Inputs]) -> None:
        runner = opened(path)
        self.in_runtime = isinstance(runner, OrtRunner)
        self.inputs = [inputs for inputs in inputs_list if runner.accepts(inputs)]
        if not self.inputs:
            raise CheckFailed(
                "there is nothing to compare: the file takes none of these inputs",
                where=f"{path}: {', '.join(runner.input_names)}",
                next_step="pass inputs of the file's own shape",
            )
        self.outputs = [runner.run(inputs) for inputs in self.inputs]
        traits, nodes = OutputTraits(path), len(OnnxGraph(path).steps)
        moved = rounded_runs(runner, self.inputs, traits)
        self._limits_at = functools.partial(file_limits, self.outputs, moved, nodes, traits)
        self.limits = self._limits_at()
        floating = [t.dtype for t in self.outputs[0].values() if t.is_floating_point()]
        self._eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)

    def with_tf32(self, rows: list[Check], path: str | Path) -> list[Check]:
        """The rows and one with TF32 on, where the last of them ran; or why there is none."""
        last = rows[-1]
        missing = no_tf32(last.provider, self._eps)
        if missing:
            return [*rows[:-1], dataclasses.replace(last, detail=f"{last.detail}; {missing}")]
        runner = OrtRunner(path, where_it_ran(last), tf32=True)
        row = self.row(last.stage, runner, BY_NOISE, self._limits_at(coarse=casting.TF32.eps))
        return [*rows, dataclasses.replace(row, precision=TF32)]

    def row(
        self,
        stage: str,
        runner: OrtRunner | ReferenceRunner,
        tolerance: Tolerance,
        limits: Mapping[str, Limit] | None = None,
    ) -> Check:
        got = [named_as(e, runner.run(i)) for e, i in zip(self.outputs, self.inputs, strict=True)]
        again = named_as(self.outputs[0], runner.run(self.inputs[0]))
        row = compare(
            self.outputs,
            got,
            limits or self.limits,
            stage=stage,
            device=runner.device,
            provider=runner.provider,
            detail="; ".join(filter(None, (runner.note, repeated(got[0], again)))),
            tolerance=tolerance,
        )
        return row.on(inputs.shapes() for inputs in self.inputs)
