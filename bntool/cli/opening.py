"""What a command works on, whatever its kind: opened, and refused where it does not know what is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bntool.cli.session import Session, Voice, open_session
from bntool.core.option import Options
from bntool.core.options import LoadOptions
from bntool.core.refusals import require_known
from bntool.files.detect import Kind, detect

if TYPE_CHECKING:
    import torch

    from bntool.cli.writing import Place
    from bntool.files.targets import Drafts
    from bntool.subjects.base import Subject


@dataclasses.dataclass(frozen=True)
class Opened:
    """A subject, where it came from, and the session of what torch runs (None for an ONNX file)."""

    subject: Any
    source: str | Path
    session: Session | None = None

    @property
    def kind(self) -> str:
        found: Subject = self.subject
        return found.kind

    def working_in(self, drafts: Drafts, place: Place | None) -> Opened:
        """The same, where new files of a graph's own are made beside the one that they become."""
        if self.kind != "onnx" or place is None:
            return self
        from bntool.subjects.onnx import OnnxSubject

        subject = OnnxSubject(self.subject.model, folder=drafts.folder_for(place.model))
        return dataclasses.replace(self, subject=subject)

    def cast(self, dtype: str) -> Opened:
        """The same module in another floating type."""
        assert self.session is not None
        self.session.cast(dtype)
        return of_session(self.session)

    @property
    def source_hash(self) -> str:
        return self.session.loaded.source_hash if self.session is not None else ""


def is_onnx(name: str | None) -> bool:
    """Whether this is an ONNX file, by what is in it."""
    return bool(name) and Path(str(name)).is_file() and detect(str(name)).kind is Kind.ONNX


def open_model(voice: Voice, name: str | None, load: LoadOptions, *asked: Options) -> Opened:
    """MODEL of any kind, or what the last command in this folder wrote.

    Raises `UsageError` for an option that its kind does not know.
    """
    if is_onnx(name):
        from bntool.subjects.onnx import OnnxSubject

        path = Path(str(name))
        require_known("onnx", load, *asked, name=str(name))
        found = OnnxSubject(path)
        voice.target.read(*found.files)
        return Opened(found, path)
    session = open_session(voice, name, load)
    opened = of_session(session)
    require_known(opened.kind, load, *asked, name=session.loaded.reference)
    return opened


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
