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
from bntool.runtime.libraries import first_line
from bntool.runtime.naming import on_nvidia
from bntool.runtime.onnx_outputs import OutputTraits
from bntool.runtime.ort_runner import OrtRunner
from bntool.runtime.torch_runner import TorchRunner
from bntool.verifying.comparing import Limit, Outputs, compare, difference
from bntool.verifying.reference import Progress, Reference, run_float64

# The surgery is algebra: redone in float64 it must agree far below any float32 rounding (6e-8), while the
# float64 noise of deep networks, measured near 1e-15 of the peak, stays far under it.
# A network that carries a rounding further is held to K_NOISE times what it makes of float64's own.
ALGEBRA_LIMIT = 1e-10
_TF32_LEAST = (8, 0)  # Ampere


def check_surgery(
    original: nn.Module,
    candidate: nn.Module,
    inputs_list: Sequence[Inputs],
    *,
    stage: str,
    candidate64: nn.Module | None = None,
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
    reference = reference.decidable()
    elsewhere = elsewhere.decidable() if elsewhere is not None else None
    say = progress or (lambda text: None)
    runner = TorchRunner(candidate, device, parts=reference.parts)
    say("running the candidate")
    remarks: list[str] = []
    changed = changed_parts if reference.parts else ()
    got = _without(_run_all(runner, reference.inputs, stage), changed)
    if twice:
        (again,) = _without(_run_all(runner, reference.inputs[:1], stage), changed)
        remarks.append(repeated(got[0], again))
    remarks += [note for note in runner.notes if note not in reference.notes]
    algebra = _check_algebra(elsewhere or reference, candidate64, stage, say, changed_parts)
    expected = _without(reference.outputs, changed)

    def judged(limits: Mapping[str, Limit]) -> list[Check]:
        limits = {name: limit for name, limit in limits.items() if name.partition(".")[0] not in changed}
        unsure = _left_to_algebra(expected, got, limits) if algebra is not None else {}
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


def check_tf32(candidate: nn.Module, reference: Reference, *, device: str) -> Check:
    """A torch model on CUDA with TF32 on, judged by what TF32 itself does to the reference."""
    coarse = reference.in_arithmetic(casting.TF32)
    runner = TorchRunner(candidate, device, tf32=True)
    row = compare(
        coarse.outputs,
        [runner.run(inputs) for inputs in coarse.inputs],
        coarse.limits,
        stage="verify",
        device=runner.device,
        provider=runner.provider,
        detail=coarse.detail,
    )
    return dataclasses.replace(row, precision=TF32)


def no_tf32(provider: str, eps: float) -> str:
    """Why a run on this provider has no TF32, of numbers that are `eps` apart; empty where it has."""
    if eps != torch.finfo(torch.float32).eps:
        return "no TF32 row: TF32 is about float32 numbers, and the model has others"
    if not on_nvidia(provider) and not provider.startswith("cuda"):
        return f"no TF32 row: TF32 needs an NVIDIA GPU, and this ran on {provider}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _TF32_LEAST:
        return "no TF32 row: this GPU is older than Ampere, and has no TF32"
    return ""


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
    expected = [reference.outputs[i] for i in fits]
    got = [runner.run(reference.inputs[i]) for i in fits]
    judged = functools.partial(
        compare,
        expected,
        [named_as(e, g) for e, g in zip(expected, got, strict=True)],
        stage=stage,
        device=runner.device,
        provider=runner.provider,
        detail="; ".join(_remarks(runner, reference, fits, got, stage, twice)),
        atol=atol,
        rtol=rtol,
    )
    slack = OutputTraits(path).slack
    if set(slack) != set(reference.limits) and len(slack) == len(reference.limits):
        slack = dict(zip(reference.limits, slack.values(), strict=True))  # as `named_as` has it

    def allowed(limits: Mapping[str, Limit]) -> dict[str, Limit]:
        return {n: dataclasses.replace(limit, absolute=slack.get(n, 0.0)) for n, limit in limits.items()}

    row = judged(allowed(reference.limits))
    settled = row.agrees or (atol, rtol) != (None, None)
    return row if settled else judged(allowed(reference.redrawn_limits))


def seeded_batches(example: Inputs, batches: Sequence[int] = (1, 2, 3), seed: int = 0) -> list[Inputs]:
    """Seeded random inputs like `example` for several batch sizes.

    Inputs nested in a list (the images of a detection model) have no batch axis: they keep their shapes
    and only the values are drawn anew.
    """
    nested = any(isinstance(a, list | tuple | dict) for a in (*example.args, *example.kwargs.values()))
    if not nested:
        return [example.rebatched(batch, seed + batch) for batch in batches]
    return [example.map(_redraw(torch.Generator().manual_seed(seed + batch))) for batch in batches]


def _without(runs: Sequence[Outputs], parts: Collection[str]) -> list[Outputs]:
    """The outputs of each run, less what these children of the model returned."""
    return [{n: t for n, t in outputs.items() if n.partition(".")[0] not in parts} for outputs in runs]


def _check_algebra(
    reference: Reference,
    candidate64: nn.Module | None,
    stage: str,
    say: Progress,
    changed_parts: Collection[str],
) -> Check | None:
    if candidate64 is None or reference.exact is None:
        return None
    say("checking the algebra in float64")
    # One input settles algebra. The second, of two examples, also tells a batch axis from a channel axis.
    chosen = slice(1, 2) if len(reference.inputs) > 1 else slice(0, 1)
    changed = changed_parts if reference.parts else ()
    exact = _without(reference.exact[chosen], changed)
    try:
        runs, _ = run_float64(candidate64, reference.inputs[chosen], parts=reference.parts)
        outputs = _without(runs, changed)
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise _does_not_run(stage, error) from error
    noise = torch.finfo(torch.float64).eps / 2
    limits = {name: Limit(noise, ALGEBRA_LIMIT) for names in exact for name in names}
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
    return dataclasses.replace(row, precision="float64")


def _left_to_algebra(
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


def _run_all(runner: TorchRunner, inputs_list: Sequence[Inputs], stage: str) -> list[dict[str, Tensor]]:
    try:
        return [runner.run(inputs) for inputs in inputs_list]
    except BntoolError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise _does_not_run(stage, error) from error


def _does_not_run(stage: str, error: Exception) -> CheckFailed:
    return CheckFailed(
        f"the model after {stage} does not run: {type(error).__name__}: {first_line(error)}",
        next_step="report this to bntool; --exclude the layer it names to go on",
    )


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
