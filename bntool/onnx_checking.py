"""Check the fold of an ONNX file: the file before against the file after, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bntool.comparing import K_NOISE, Limit, compare, rounding_term
from bntool.inputs import Inputs
from bntool.runtime.ort_runner import OrtRunner
from bntool.verdicts import Check

_FREE_SIDE = 64
"""The length of an axis, other than the batch, that the file leaves open."""
_TYPES = {
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bfloat16)": torch.bfloat16,
}


def example_inputs_of(path: str | Path, batch: int = 1, seed: int = 0) -> Inputs:
    """Seeded inputs of the shapes that the file declares: an open first axis is the batch."""
    generator = torch.Generator().manual_seed(seed + batch)
    named: dict[str, Any] = {}
    for name, kind, axes in OrtRunner(path, "cpu", optimize=False).signature:
        shape = [n if isinstance(n, int) else batch if i == 0 else _FREE_SIDE for i, n in enumerate(axes)]
        if "int" in kind:
            named[name] = torch.randint(0, 2, shape, generator=generator)
        elif "bool" in kind:
            named[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            named[name] = torch.randn(shape, generator=generator).to(_TYPES.get(kind, torch.float32))
    return Inputs((), named, origin="the shapes that the file declares")


def check_onnx_fold(
    before: str | Path, after: str | Path, inputs_list: Sequence[Inputs], layers: int, *, device: str = "auto"
) -> list[Check]:
    """Two rows: the fold with ONNX Runtime's optimisations off, the runtime with them on.

    No float64 run tells the noise of a file, so the limit is derived: a walk of one rounding for each of
    `layers`, which both sides may draw `K_NOISE` times.

    Raises `DeviceError` when the device is not honoured, `ExportError` when a file does not run.
    """
    reference = OrtRunner(before, "cpu", optimize=False)
    fits = [inputs for inputs in inputs_list if reference.accepts(inputs)]
    expected = [reference.run(inputs) for inputs in fits]
    rows = []
    for stage, on, optimize in (("fold", "cpu", False), ("runtime", device, True)):
        runner = OrtRunner(after, on, optimize=optimize)
        got = [runner.run(inputs) for inputs in fits]
        limits = {name: _limit(tensor, layers) for outputs in expected for name, tensor in outputs.items()}
        detail = "; ".join(filter(None, ("the limit is derived, not measured", runner.note)))
        row = compare(
            expected, got, limits, stage=stage, device=runner.device, provider=runner.provider, detail=detail
        )
        rows.append(row)
    return rows


def check_onnx_unchanged(before: str | Path, after: str | Path, inputs_list: Sequence[Inputs]) -> Check:
    """Two files that compute the same to the last bit, with ONNX Runtime's optimisations off."""
    reference, candidate = (OrtRunner(path, "cpu", optimize=False) for path in (before, after))
    fits = [inputs for inputs in inputs_list if reference.accepts(inputs)]
    expected, got = ([runner.run(inputs) for inputs in fits] for runner in (reference, candidate))
    limits = {name: Limit(0.0, 0.0) for outputs in expected for name in outputs}
    return compare(
        expected, got, limits, stage="insert", device=candidate.device, provider=candidate.provider
    )


def _limit(tensor: torch.Tensor, layers: int) -> Limit:
    if not tensor.is_floating_point():
        return Limit(0.0, 0.0)
    noise = rounding_term(torch.finfo(tensor.dtype).eps, layers) / 2
    return Limit(noise, (K_NOISE + 2) * noise)
