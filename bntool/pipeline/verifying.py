"""Two models of any kind against each other, by the reference's own noise floor."""

from __future__ import annotations

import dataclasses

import torch

from bntool.core.errors import CheckFailed
from bntool.core.verdicts import Check
from bntool.graph.inputs import Inputs
from bntool.subjects.base import Checking, Subject
from bntool.verifying.checking import check_surgery, seeded_batches
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.onnx_verifying import check_files, seeded_file_inputs
from bntool.verifying.reference import Reference


def compare_models(
    reference: Subject, candidate: Subject, inputs: Inputs | None, checking: Checking
) -> list[Check]:
    """A row for each stage. Of an ONNX file and a torch model, the latter is the reference: it has float64.

    Raises `CheckFailed` where there is nothing to compare, `DeviceError` where the device is not there.
    """
    if candidate.on_torch and not reference.on_torch:
        reference, candidate = candidate, reference
    batches = (1, 2, 3) if checking.full else (1,)
    if not reference.on_torch:
        drawn = [inputs] if inputs else seeded_file_inputs(reference.model, batches, checking.seed)
        return check_files(reference.model, candidate.model, drawn, checking.on_onnx())
    example = inputs or reference.example() or candidate.example()
    if example is None:
        raise CheckFailed("there is nothing to compare: no input is known", next_step="pass inputs=")
    several = seeded_batches(example, batches, checking.seed) if checking.full else [example]
    runs = Reference(reference.runnable, several)
    if inputs is not None and checking.full:
        several = [inputs, *several]
    if not candidate.on_torch:
        return check_onnx(runs, candidate.model, checking.on_onnx())
    on = checking.torch_device
    on = ("cuda" if torch.cuda.is_available() else "cpu") if on == "auto" else on
    how = dataclasses.replace(checking.on_torch(), device=on)
    return check_surgery(runs, candidate.runnable, stage="verify", how=how)
