"""What a model is made of."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from bntool.api.asked import Model
from bntool.core.errors import BntoolError
from bntool.graph.inputs import Inputs
from bntool.inserting import redundant_biases
from bntool.report.summary import Summary, summarize
from bntool.subjects import subject_of
from bntool.subjects.module import ModuleSubject


def summary(model: Model, example_inputs: Any = None, *, baseline: nn.Module | Summary | None = None) -> Any:
    """Layers, shapes and exact counts of a model; with a baseline, the difference too.

    Args:
        model: an `nn.Module` (a `Summary`), an `ExportedProgram` or an ONNX file (a `ProgramSummary`: its
            tensors by name), or a path or reference of one.
        example_inputs: inferred where they are not given; where that fails the shapes stay blank.
        baseline: what a module is compared with.
    """
    subject = subject_of(model, example_inputs)
    if not isinstance(subject, ModuleSubject):
        from bntool.report.program_summary import summarize_onnx, summarize_program
        from bntool.subjects.onnx import OnnxSubject

        return (
            summarize_onnx(subject.observed)
            if isinstance(subject, OnnxSubject)
            else summarize_program(subject.model)
        )
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    idle: list[str] = []
    with contextlib.suppress(BntoolError):
        observation = ModuleSubject(subject.model, example_inputs, small=False).observation
        inputs = observation.inputs
        idle = [dropped.conv for dropped in redundant_biases(observation.graph)]
    return summarize(subject.model, inputs, baseline=baseline, idle_biases=idle)
