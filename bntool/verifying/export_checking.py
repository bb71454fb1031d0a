"""A torch model against its ONNX file: the export (nothing optimised), and the runtime (all optimised).

Each stage has its own verdict. Both are judged against the original's own float64 run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from bntool.core.errors import CheckFailed
from bntool.core.tolerances import BY_NOISE, Limit
from bntool.core.verdicts import TF32, Check
from bntool.precision import casting
from bntool.runtime.naming import on_nvidia
from bntool.runtime.onnx_outputs import OutputTraits
from bntool.runtime.ort_runner import OrtRunner
from bntool.verifying.checking import repeated
from bntool.verifying.comparing import Outputs, compare
from bntool.verifying.conditions import DEFAULT, Conditions
from bntool.verifying.reference import Reference
from bntool.verifying.tf32 import no_tf32


def check_onnx(reference: Reference, path: str | Path, how: Conditions = DEFAULT) -> list[Check]:
    """Compare an ONNX file with the torch model: the export stage (ONNX Runtime's optimisations off), then
    the runtime stage (optimisations on), both on one device. `how.twice` runs the last of them again, which
    is always done on CUDA. `how.tf32` adds a row with TF32 on, judged by what TF32 itself does to the model;
    where nothing here has TF32 the runtime row says so.

    Raises `DeviceError` when CUDA is asked for and not honoured, `ExportError` when the file does not run,
    `CheckFailed` when none of the inputs fits it.
    """
    checks: list[Check] = []
    slack: Mapping[str, float] | None = None
    for stage, optimize in (("export", False), ("runtime", True)):
        runner = OrtRunner(path, how.device, optimize=optimize)
        if slack is None:  # read once, when the runtime has taken the file
            slack = OutputTraits(path).slack
        how.progress(f"{stage}: {runner.label} on {runner.provider}")
        checks.append(_check_file(runner, reference, slack, stage, how))
    if not how.tf32:
        return checks
    missing = no_tf32(runner.provider, reference.eps)
    if missing:
        last = checks[-1]
        return [
            *checks[:-1],
            dataclasses.replace(last, detail="; ".join(filter(None, (last.detail, missing)))),
        ]
    runner = OrtRunner(path, how.device, optimize=True, tf32=True)
    coarse = reference.in_arithmetic(casting.TF32)
    row = _check_file(runner, coarse, slack or {}, "runtime", dataclasses.replace(how, tolerance=BY_NOISE))
    return [*checks, dataclasses.replace(row, precision=TF32)]


def _check_file(
    runner: OrtRunner,
    reference: Reference,
    slack: Mapping[str, float],
    stage: str,
    how: Conditions,
) -> Check:
    fits = [i for i, inputs in enumerate(reference.inputs) if runner.accepts(inputs)]
    if not fits:
        raise CheckFailed(
            "there is nothing to compare: the file takes none of these inputs",
            where=f"{runner.label}: {', '.join(runner.input_names)}",
            next_step="pass an input of the file's own shape with --input NAME:SHAPE",
        )
    got = [runner.run(reference.inputs[i]) for i in fits]
    got = [named_as(reference.own[i], outputs) for i, outputs in zip(fits, got, strict=True)]
    judged = functools.partial(
        compare,
        stage=stage,
        device=runner.device,
        provider=runner.provider,
        detail="; ".join(_remarks(runner, reference, fits, got, stage, how.twice)),
        tolerance=how.tolerance,
    )
    ran_on = [reference.inputs[i].shapes() for i in fits]

    def allowed(limits: Mapping[str, Limit]) -> dict[str, Limit]:
        named = slack
        if set(slack) != set(limits) and len(slack) == len(limits):
            named = dict(zip(limits, slack.values(), strict=True))  # as `named_as` has it
        return {n: dataclasses.replace(limit, absolute=named.get(n, 0.0)) for n, limit in limits.items()}

    exactly = how.tolerance.is_asked
    if reference.floor is not None and not exactly:
        row = judged([reference.own[i] for i in fits], got, allowed(reference.floor.limits))
        if row.passed:
            return row.on(ran_on)
    expected = [reference.outputs[i] for i in fits]
    row = judged(expected, got, allowed(reference.limits))
    row = row if row.agrees or exactly else judged(expected, got, allowed(reference.redrawn_limits))
    return row.on(ran_on)


def _remarks(
    runner: OrtRunner,
    reference: Reference,
    fits: list[int],
    got: list[dict[str, Tensor]],
    stage: str,
    twice: bool,
) -> Iterator[str]:
    yield from reference.notes
    if runner.note:
        yield runner.note
    if len(fits) < len(reference.inputs):
        yield f"only {len(fits)} of {len(reference.inputs)} inputs fit the file's fixed shape"
    if runner.cpu_nodes:
        yield f"kept on the CPU by ONNX Runtime: {', '.join(runner.cpu_nodes)}"
    if stage == "runtime" and (twice or on_nvidia(runner.provider)):
        yield repeated(got[0], runner.run(reference.inputs[fits[0]]))


def named_as(expected: Outputs, got: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files exported elsewhere name their outputs as they like; their order is the model's."""
    if set(expected) == set(got) or len(expected) != len(got):
        return got
    return dict(zip(expected, got.values(), strict=True))
