"""What a surgery is done to: a module, an exported program, an ONNX file, TorchScript, or weights alone.

Each says how it is planned on, changed, run and exported; what is done with that is written once, in
`surgeries`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from bntool.core.errors import NeedsArchitecture
from bntool.core.option import Options
from bntool.core.refusals import require_known
from bntool.files.detect import Kind, detect

if TYPE_CHECKING:
    from bntool.subjects.base import Subject
    from bntool.subjects.weights import WeightsSubject


def subject_of(
    model: Any,
    example_inputs: Any = None,
    *asked: Options,
    command: str = "",
    stand_ins: bool = False,
    bare: bool = False,
) -> Subject:
    """A model of any kind as a subject: a module, a program, TorchScript, or a path or reference of one.

    With `stand_ins`, also a file whose classes are not here, to be looked at and not run; with `bare`, also
    weights without their model. `command` is what asks, where it makes more of the options work.

    Raises:
        UsageError: it is none; or one of the options `asked` is out of bounds, or none that its kind knows.
        LoadError: the file cannot be loaded.
    """
    for options in asked:
        options.validate()
    found = _subject_of(model, example_inputs, stand_ins, bare)
    require_known(found.kind, *asked, name=found.name, command=command)
    return found


def _subject_of(model: Any, example_inputs: Any, stand_ins: bool, bare: bool) -> Subject:
    if isinstance(model, str | Path):
        name, path = str(model), Path(model)
        if path.is_file() and detect(path).kind is Kind.ONNX:
            from bntool.subjects.onnx import OnnxSubject

            file = OnnxSubject(path)
            if example_inputs is not None:
                file.take(example_inputs)
            return file
        from bntool.files.loading import load

        try:
            loaded = load(name, stand_ins=stand_ins)
        except NeedsArchitecture as error:
            if bare:
                return weights_of(path, error)
            raise
        if example_inputs is None:
            example_inputs = loaded.example_inputs
        found = _in_memory(loaded.model, example_inputs, name)
        found.files = loaded.files
        return found
    return _in_memory(model, example_inputs, "")


def weights_of(path: Path, error: NeedsArchitecture) -> WeightsSubject:
    """What was read of a file whose model is not known."""
    from bntool.files.stored import in_memory
    from bntool.subjects.weights import WeightsSubject

    return WeightsSubject(in_memory(path, error.weights), why=error.what)


def _in_memory(model: Any, example_inputs: Any, name: str) -> Subject:
    if isinstance(model, ExportedProgram):
        from bntool.subjects.program import ProgramSubject

        return ProgramSubject(model, example_inputs, name=name or "program")
    import torch

    if isinstance(model, torch.jit.ScriptModule):
        from bntool.graph.inputs import Inputs
        from bntool.subjects.script import ScriptSubject

        inputs = None if example_inputs is None else Inputs.of(example_inputs)
        return ScriptSubject(model, inputs, name=name)
    from bntool.subjects.module import ModuleSubject

    return ModuleSubject(model, example_inputs, name=name)
