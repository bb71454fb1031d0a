"""What a surgery is done to: a module, an exported program, an ONNX file or a TorchScript module.

Each says how it is planned on, changed, run and exported; what is done with that is written once, in
`surgeries`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.export import ExportedProgram

from bntool.core.errors import UsageError
from bntool.core.option import Options
from bntool.core.options import ExportOptions, FoldOptions
from bntool.core.refusals import KINDS, require_known
from bntool.files.detect import Kind, detect

if TYPE_CHECKING:
    from bntool.subjects.base import Exportable, Subject


def subject_of(
    model: Any, example_inputs: Any = None, *asked: Options, command: str = "", stand_ins: bool = False
) -> Subject:
    """A model of any kind as a subject: a module, a program, TorchScript, or a path or reference of one.

    With `stand_ins`, also a file whose classes are not here, to be looked at and not run. `command` is what
    asks, where it makes more of the options work.

    Raises:
        UsageError: it is none; or one of the options `asked` is out of bounds, or none that its kind knows.
        LoadError: the file cannot be loaded.
    """
    for options in asked:
        options.validate()
    found = _subject_of(model, example_inputs, stand_ins)
    require_known(found.kind, *asked, name=found.name, command=command)
    return found


def prepared(subject: Subject, options: FoldOptions) -> Subject:
    """The subject as a fold begins with it: with `bake`, weights that layers compute are stored first.

    Raises:
        CheckFailed: with the stored weights it does not compute the same.
    """
    from bntool.subjects.module import ModuleSubject

    return subject.baked() if options.bake and isinstance(subject, ModuleSubject) else subject


def exportable(subject: Subject, how: ExportOptions) -> Exportable:
    """The subject as one that can be written as ONNX: TorchScript becomes a module that computes the same.

    Raises:
        UsageError: it is an ONNX file, and no other opset is asked for.
        ExportError: torch's converter does not take the TorchScript.
    """
    if subject.kind == "onnx" and how.opset is None:
        raise UsageError(
            f"{subject.name} is {KINDS['onnx']} already",
            next_step=f"bntool export {subject.name} --opset 17 converts it to another opset",
        )
    if subject.kind != "script":
        return cast("Exportable", subject)
    from bntool.subjects.module import ModuleSubject
    from bntool.subjects.script_folding import converted

    example = subject.example()
    if example is None:
        raise UsageError(
            f"{subject.name} says nothing of its input's shape", next_step="give --input N,C,H,W"
        )
    found = ModuleSubject(converted(subject.model, example), example, name=subject.name)
    found.files = subject.files
    return found


def _subject_of(model: Any, example_inputs: Any, stand_ins: bool) -> Subject:
    if isinstance(model, str | Path):
        name, path = str(model), Path(model)
        if path.is_file() and detect(path).kind is Kind.ONNX:
            from bntool.subjects.onnx import OnnxSubject

            file = OnnxSubject(path)
            if example_inputs is not None:
                file.take(example_inputs)
            return file
        from bntool.files.loading import load

        loaded = load(name, stand_ins=stand_ins)
        if example_inputs is None:
            example_inputs = loaded.example_inputs
        found = _in_memory(loaded.model, example_inputs, name)
        found.files = loaded.files
        return found
    return _in_memory(model, example_inputs, "")


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
