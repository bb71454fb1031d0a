"""The stages of a check: torch against torch (fold, insert), torch against ONNX (export), and the runtime.

Each stage has its own verdict, so that a failure says who broke it. All are judged against the original's
own float64 run, and no model runs twice on the same inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bntool.core.errors import BntoolError, CheckFailed
from bntool.core.verdicts import TF32, Check
from bntool.graph.inputs import Inputs
from bntool.models import casting
from bntool.runtime.naming import on_nvidia
from bntool.runtime.onnx_outputs import OutputTraits
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.algebra import check_algebra, does_not_run, left_to_algebra, without
from bntool.verifying.comparing import Limit, Outputs, compare
from bntool.verifying.differences import difference
from bntool.verifying.float64 import Unrounded
from bntool.verifying.reference import Progress, Reference
from bntool.verifying.tf32 import no_tf32


def check_surgery(
    original: nn.Module,
    candidate: nn.Module,
    inputs_list: Sequence[Inputs],
    *,
    stage: str,
    candidate64: nn.Module | Unrounded | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    reference: Reference | None = None,
    elsewhere: Reference | None = None,
    changed_parts: Collection[str] = (),
    twice: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
) -> list[Check]:
    """Compare a model before and after surgery, both in eval mode: a row in its own precision, and with
    `candidate64` (the surgery redone on the model in float64) a second row that proves the algebra, on the
    inputs of `elsewhere` where that is given. `changed_parts` are children of the model that return something
    else after the surgery, as they should: where parts are compared, they are left out. `twice` runs the
    candidate again on one input and tells whether it repeats itself.

    Raises `CheckFailed` when there is nothing to compare or the candidate does not run.
    """
    reference = reference or Reference(original, inputs_list, device=device, progress=progress)
    if reference.floor is not None and not twice and (atol, rtol) == (None, None):
        rows = _by_floor(reference, reference.floor, candidate, candidate64, stage, device, progress)
        if all(row.passed for row in rows):
            return rows
    reference = reference.decidable()
    elsewhere = elsewhere.decidable() if elsewhere is not None else None
    say = progress or (lambda text: None)
    runner = TorchRunner(candidate, device, parts=reference.parts)
    say("running the candidate")
    remarks: list[str] = []
    changed = changed_parts if reference.parts else ()
    got = without(_run_all(runner, reference.inputs, stage), changed)
    if twice:
        (again,) = without(_run_all(runner, reference.inputs[:1], stage), changed)
        remarks.append(repeated(got[0], again))
    remarks += [note for note in runner.notes if note not in reference.notes]
    # One input settles algebra. The second, of two examples, also tells a batch axis from a channel axis.
    chosen = slice(1, 2) if elsewhere is None and len(reference.inputs) > 1 else slice(None)
    algebra = check_algebra(elsewhere or reference, candidate64, stage, say, changed_parts, chosen)
    expected = without(reference.outputs, changed)

    def judged(limits: Mapping[str, Limit]) -> list[Check]:
        limits = {name: limit for name, limit in limits.items() if name.partition(".")[0] not in changed}
        unsure = left_to_algebra(expected, got, limits) if algebra is not None else {}
        if algebra is not None and unsure.keys() >= limits.keys():
            reasons = "; ".join(f"{name}: {why}" for name, why in unsure.items())
            return [dataclasses.replace(algebra, detail="; ".join(filter(None, (algebra.detail, reasons))))]
        row = compare(
            [{n: t for n, t in outputs.items() if n not in unsure} for outputs in expected],
            [{n: t for n, t in outputs.items() if n not in unsure} for outputs in got],
            limits,
            stage=stage,
            device=runner.device,
            provider=runner.provider,
            detail="; ".join(
                [
                    *reference.notes,
                    *remarks,
                    *(f"{n}: {why}, decided in float64" for n, why in unsure.items()),
                ]
            ),
            atol=atol,
            rtol=rtol,
        )
        return [row] if algebra is None else [row, algebra]

    rows = judged(reference.limits)
    settled = rows[0].agrees or (algebra is not None and not algebra.agrees)
    return rows if settled or (atol, rtol) != (None, None) else judged(reference.redrawn_limits)


def _by_floor(
    reference: Reference,
    floor: Reference,
    candidate: nn.Module,
    candidate64: nn.Module | Unrounded | None,
    stage: str,
    device: str,
    progress: Progress | None,
) -> list[Check]:
    """The rows by what the original's rounding does on smaller inputs: the candidate against the original's
    own runs here, and the algebra there.
    """
    say = progress or (lambda text: None)
    runner = TorchRunner(candidate, device)
    algebra = check_algebra(floor, candidate64, stage, say)
    say("running the candidate")
    got = _run_all(runner, reference.inputs, stage)
    remarks = [note for note in runner.notes if note not in reference.notes]
    row = compare(
        reference.own,
        got,
        floor.limits,
        stage=stage,
        device=runner.device,
        provider=runner.provider,
        detail="; ".join([*reference.notes, *remarks]),
    )
    return [row] if algebra is None else [row, algebra]


def check_onnx(
    model: nn.Module,
    path: str | Path,
    inputs_list: Sequence[Inputs],
    *,
    device: str = "auto",
    progress: Progress | None = None,
    reference: Reference | None = None,
    tf32: bool = False,
    twice: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
) -> list[Check]:
    """Compare an ONNX file with the torch model: the export stage (ONNX Runtime's optimisations off), then
    the runtime stage (optimisations on), both on `device`. `twice` runs the last of them again and tells
    whether it repeats itself, which is always told of CUDA. `tf32` adds a row with TF32 on, judged by what
    TF32 itself does to the model; where nothing here has TF32 the runtime row says so.

    Raises `DeviceError` when CUDA is asked for and not honoured, `ExportError` when the file does not run,
    `CheckFailed` when none of the inputs fits it.
    """
    reference = reference or Reference(model, inputs_list, progress=progress)
    checks: list[Check] = []
    for stage, optimize in (("export", False), ("runtime", True)):
        runner = OrtRunner(path, device, optimize=optimize)
        if progress:
            progress(f"{stage}: {runner.label} on {runner.provider}")
        checks.append(_check_file(runner, reference, path, stage, twice=twice, atol=atol, rtol=rtol))
    if not tf32:
        return checks
    missing = no_tf32(runner.provider, reference.eps)
    if missing:
        last = checks[-1]
        return [
            *checks[:-1],
            dataclasses.replace(last, detail="; ".join(filter(None, (last.detail, missing)))),
        ]
    runner = OrtRunner(path, device, optimize=True, tf32=True)
    coarse = reference.in_arithmetic(casting.TF32)
    row = _check_file(runner, coarse, path, "runtime", twice=twice)
    return [*checks, dataclasses.replace(row, precision=TF32)]


def _check_file(
    runner: OrtRunner,
    reference: Reference,
    path: str | Path,
    stage: str,
    *,
    twice: bool,
    atol: float | None = None,
    rtol: float | None = None,
) -> Check:
    fits = [i for i, inputs in enumerate(reference.inputs) if runner.accepts(inputs)]
    if not fits:
        raise CheckFailed(
            "there is nothing to compare: the file takes none of these inputs",
            where=f"{path}: {', '.join(runner.input_names)}",
            next_step="pass an input of the file's own shape with --input NAME:SHAPE",
        )
    got = [runner.run(reference.inputs[i]) for i in fits]
    got = [named_as(reference.own[i], outputs) for i, outputs in zip(fits, got, strict=True)]
    judged = functools.partial(
        compare,
        stage=stage,
        device=runner.device,
        provider=runner.provider,
        detail="; ".join(_remarks(runner, reference, fits, got, stage, twice)),
        atol=atol,
        rtol=rtol,
    )
    slack = OutputTraits(path).slack

    def allowed(limits: Mapping[str, Limit]) -> dict[str, Limit]:
        named = slack
        if set(slack) != set(limits) and len(slack) == len(limits):
            named = dict(zip(limits, slack.values(), strict=True))  # as `named_as` has it
        return {n: dataclasses.replace(limit, absolute=named.get(n, 0.0)) for n, limit in limits.items()}

    exactly = (atol, rtol) != (None, None)
    if reference.floor is not None and not exactly:
        row = judged([reference.own[i] for i in fits], got, allowed(reference.floor.limits))
        if row.passed:
            return row
    expected = [reference.outputs[i] for i in fits]
    row = judged(expected, got, allowed(reference.limits))
    return row if row.agrees or exactly else judged(expected, got, allowed(reference.redrawn_limits))


def seeded_batches(example: Inputs, batches: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Inputs]:
    """Seeded random inputs like `example` for several batch sizes.

    Inputs nested in a list (the images of a detection model) have no batch axis: they keep their shapes
    and only the values are drawn anew.
    """
    nested = any(isinstance(a, list | tuple | dict) for a in (*example.args, *example.kwargs.values()))
    if not nested:
        return [example.rebatched(batch, seed + batch) for batch in batches]
    return [example.map(_redraw(torch.Generator().manual_seed(seed + batch))) for batch in batches]


def _run_all(runner: TorchRunner, inputs_list: Sequence[Inputs], stage: str) -> list[dict[str, Tensor]]:
    try:
        return [runner.run(inputs) for inputs in inputs_list]
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise does_not_run(stage, error) from error


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


def repeated(first: Outputs, again: Outputs) -> str:
    """Whether a second run on the same inputs gives the same bits, or what it differs by."""
    worst = max((difference(first[name], again.get(name)).relative for name in first), default=0.0)
    return f"a second run differs by {worst:.2g} of the peak" if worst else "a second run gives the same bits"


def named_as(expected: Outputs, got: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files exported elsewhere name their outputs as they like; their order is the model's."""
    if set(expected) == set(got) or len(expected) != len(got):
        return got
    return dict(zip(expected, got.values(), strict=True))


def _redraw(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def draw(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)
        return t

    return draw
