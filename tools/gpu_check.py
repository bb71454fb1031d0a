"""Check folding and export on an NVIDIA GPU and write what was measured to docs/gpu.md.

Exits 5, and writes nothing, where CUDA does not truly work; exits 1 when a check fails.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import bntool
from bntool.checking import check_onnx, check_surgery, seeded_batches
from bntool.doctor import diagnose
from bntool.errors import BntoolError, DeviceError
from bntool.exporting import export_onnx
from bntool.inputs import Inputs
from bntool.reference import Reference
from bntool.runtime.libraries import CUDA
from bntool.runtime.providers import why_no_cuda
from bntool.verdicts import Check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
MODELS = {"resnet18": 224, "vgg11_bn": 224, "mobilenet_v3_small": 224, "densenet121": 224}


def main() -> int:
    reason = "torch cannot use CUDA" if not torch.cuda.is_available() else why_no_cuda()
    if reason:
        print(f"no GPU check: {reason}; docs/gpu.md is left as it is", file=sys.stderr)
        return 5
    rows: list[tuple[str, Check]] = []
    try:
        for name, size in MODELS.items():
            rows += [(name, check) for check in checks_of(name, size)]
    except BntoolError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    PAGE.write_text(page(rows), encoding="utf-8")
    failed = [f"{name} {check.stage}: {check.detail}" for name, check in rows if not check.passed]
    print("\n".join([f"{len(rows)} checks, {len(failed)} failed; wrote {PAGE.name}", *failed]))
    return 1 if failed else 0


def checks_of(name: str, size: int) -> list[Check]:
    """The three stages for one torchvision model with seeded weights and running statistics."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    example = Inputs((torch.zeros(1, 3, size, size),))
    inputs = seeded_batches(example)
    folded = bntool.fold(model, example).model
    # One reference for all stages: the model before the fold, in its own precision on the GPU.
    reference = Reference(model, inputs, device="cuda")
    checks = check_surgery(model, folded, inputs, stage="fold", device="cuda", reference=reference)
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(folded, example, Path(folder) / f"{name}.onnx").path
        checks += check_onnx(model, path, inputs, device="cuda", reference=reference)
    wrong = [check for check in checks[-2:] if check.provider != CUDA]
    if wrong:
        raise DeviceError(f"{name} ran on {wrong[0].provider}")
    return checks


def page(rows: list[tuple[str, Check]]) -> str:
    versions = [f"- {row.name}: {row.detail}" for row in diagnose().rows]
    table = [
        f"| {name} | {c.stage} | {c.device} | {c.provider} | {'passed' if c.passed else 'FAILED'} "
        f"| {c.relative:.2g} | {c.ratio:.2g} | {c.limit:.2g} |"
        for name, c in rows
    ]
    return "\n".join(
        [
            "# Measured on a GPU",
            "",
            "Written by `make gpu-check`. Random seeded weights and running statistics, batches 1, 2 and 3,",
            "TF32 off on both sides. `relative` is the largest difference over the peak of the float64",
            "output, `x noise` the same in units of the model's own rounding noise.",
            "",
            *versions,
            "",
            "| model | stage | device | provider | verdict | relative | x noise | limit |",
            "|---|---|---|---|---|---|---|---|",
            *table,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
