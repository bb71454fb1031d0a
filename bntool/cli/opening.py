"""What a command works on, whatever its kind: opened, and refused where it does not know what is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bntool.cli.session import Session, Voice, open_session
from bntool.core.command_options import FileOptions, LoadOptions, RealOptions
from bntool.core.errors import LoadError, NeedsArchitecture, UsageError
from bntool.core.option import Options
from bntool.core.options import CheckOptions, ExportOptions, FoldOptions
from bntool.core.refusals import require_known, require_module
from bntool.files.detect import Kind, detect

if TYPE_CHECKING:
    import torch

    from bntool.cli.writing import Place
    from bntool.files.drafting import Drafts
    from bntool.graph.inputs import Inputs
    from bntool.subjects.base import Subject


@dataclasses.dataclass(frozen=True)
class Opened:
    """A subject, where it came from, and the session of what torch runs (None for other files)."""

    subject: Any
    source: str | Path
    session: Session | None = None
    inputs: tuple[Inputs, ...] = ()
    """The user's own, in the batches that it is checked on."""

    @property
    def kind(self) -> str:
        found: Subject = self.subject
        return found.kind

    def working_in(self, drafts: Drafts, place: Place | None) -> Opened:
        """The same, where new files of a graph's own are made beside the one that they become."""
        if place is None:
            return self
        return dataclasses.replace(
            self, subject=self.subject.working_in(lambda: drafts.folder_for(place.model))
        )

    def reading(self, file: FileOptions, check: CheckOptions) -> Opened:
        """The same, where an ONNX file is read as is asked. Raises `UsageError` for a check without a run."""
        if not file.run and check.check != "none":
            raise UsageError("--no-run leaves nothing to check with", next_step="add --check none")
        self.subject.read_as(run=file.run, freeze=file.freeze_inputs)
        return self

    def on(self, real: RealOptions, load: LoadOptions, *, full: bool) -> Opened:
        """The same, observed and checked on the inputs in a file, where one is named.

        Raises `LoadError` for a file that cannot be read, `UsageError` for what the model does not take.
        """
        if real.inputs_file is None:
            return self
        require_one(real, load)
        from bntool.cli.real_inputs import file_inputs, session_inputs

        if self.session is None:
            found = file_inputs(self.source, real.inputs_file, full=full)[1]
        else:
            found = session_inputs(self.session, real.inputs_file, full=full)[1]
        self.subject.run_on(found)
        return dataclasses.replace(self, inputs=tuple(found))

    def cast(self, dtype: str) -> Opened:
        """The same module in another floating type."""
        import torch

        assert self.session is not None
        self.session.cast(dtype)
        inputs = tuple(one.to(dtype=getattr(torch, dtype)) for one in self.inputs)
        return dataclasses.replace(of_session(self.session), inputs=inputs)

    def prepared(self, how: FoldOptions) -> Opened:
        """The same, as a fold begins with it."""
        subject = self.subject.prepared(how)
        if subject is self.subject or self.session is None:
            return self
        loaded = dataclasses.replace(self.session.loaded, model=subject.runnable)
        session = dataclasses.replace(self.session, loaded=loaded, _observation=None)
        return Opened(subject, self.source, session)

    def exportable(self, how: ExportOptions) -> Opened:
        """The same, as a model that can be exported, on the same inputs."""
        subject = self.subject.exportable(how)
        if subject is self.subject or self.session is None:
            return self
        loaded = dataclasses.replace(self.session.loaded, model=subject.model, kind="module")
        session = dataclasses.replace(self.session, loaded=loaded, _observation=None)
        return dataclasses.replace(of_session(session), inputs=self.inputs)

    @property
    def source_hash(self) -> str:
        return self.session.loaded.source_hash if self.session is not None else ""


def require_one(real: RealOptions, load: LoadOptions) -> None:
    """Raise `UsageError` for inputs and a shape of inputs."""
    if real.inputs_file is not None and load.inputs:
        raise UsageError("--inputs and --input both say what it is run on", next_step="give one of the two")


def is_onnx(name: str | None) -> bool:
    """Whether this is an ONNX file, by what is in it."""
    return bool(name) and Path(str(name)).is_file() and detect(str(name)).kind is Kind.ONNX


def open_model(
    voice: Voice,
    name: str | None,
    load: LoadOptions,
    *asked: Options,
    but: str = "",
    stand_ins: bool = False,
) -> Opened:
    """MODEL of any kind, or what the last command in this folder wrote.

    `but` is a command that makes more of its kind's options work; with `stand_ins` also a model whose classes
    are not here is opened, and weights without their model, to be looked at and not run. Raises `UsageError`
    for an option that its kind does not know.
    """
    if is_onnx(name):
        from bntool.subjects.onnx import OnnxSubject

        path = Path(str(name))
        require_known("onnx", load, *asked, name=str(name), command=but)
        found = OnnxSubject(path)
        if load.inputs:
            from bntool.cli.example_inputs import shapes_by_name

            found.asked = shapes_by_name(path, load.inputs, found.input_names)
        voice.target.read(*found.files)
        return Opened(found, path)
    try:
        session = open_session(voice, name, load, stand_ins=stand_ins)
    except NeedsArchitecture as error:
        if not stand_ins:
            raise
        from bntool.subjects import weights_of

        weights = weights_of(Path(error.where), error)
        require_known("weights", load, *asked, name=weights.name, command=but)
        return Opened(weights, weights.model.path)
    opened = of_session(session)
    require_known(opened.kind, load, *asked, name=session.loaded.reference, command=but)
    return opened


def open_weights(voice: Voice, name: str | None, *asked: Options) -> Opened:
    """MODEL where it is a file of weights, which are read one at a time. Raises `LoadError` for another."""
    require_known("weights", *asked, name=name or "")
    if not name or not Path(name).is_file():
        raise LoadError(
            f"no such file: {name or '(no MODEL)'}",
            next_step="bntool fold weights.safetensors --plan other_folded.pt.bntool.json",
        )
    from bntool.files.stored import open_stored
    from bntool.subjects.weights import WeightsSubject

    subject = WeightsSubject(open_stored(Path(name)))
    voice.target.read(*subject.files)
    return Opened(subject, Path(name))


def open_module(voice: Voice, name: str | None, load: LoadOptions, what: str) -> Session:
    """MODEL where it is an `nn.Module`; `UsageError` for another kind, which bntool does not do `what` of."""
    if is_onnx(name):
        require_module("onnx", what, str(name))
    session = open_session(voice, name, load)
    require_module(of_session(session).kind, what, session.loaded.reference)
    return session


def of_session(session: Session) -> Opened:
    """What a session holds."""
    loaded = session.loaded
    source = loaded.path or loaded.reference
    subject: Any
    if session.program is not None:
        from bntool.subjects.program import ProgramSubject

        subject = ProgramSubject(session.program, name=loaded.reference, seed=session.seed)
    elif loaded.kind == "script":
        from bntool.subjects.script import ScriptSubject

        script = cast("torch.jit.ScriptModule", session.model)
        subject = ScriptSubject(script, session.known_inputs, name=loaded.reference)
    else:
        from bntool.subjects.module import ModuleSubject

        subject = ModuleSubject(session.model, name=loaded.reference, observed=session.observe)
    return Opened(subject, source, session)
