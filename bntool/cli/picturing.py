"""The model in the document of a command: its layers before and after, and what its BatchNorms compute."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Session, Voice
from bntool.core.errors import BntoolError

if TYPE_CHECKING:
    from torch import nn

    from bntool.cli.opening import Opened
    from bntool.subjects.base import Subject


def picture(voice: Voice, opened: Opened, after: Any = None) -> None:
    """The model that was opened, of whatever kind, and what a surgery made of it.

    An axis that a file leaves open has a size of our own choosing.
    """
    name = opened.subject.name if opened.session is not None else Path(opened.subject.name).name
    _picture(voice, name, opened.subject, after)
    session = opened.session
    if voice.model is not None and session is not None and session.inputs is not None:
        voice.model["input"] = session.inputs.shapes()


def picture_module(session: Session, changed: nn.Module | None = None) -> None:
    """The model of the session, and another on the same inputs."""
    from bntool.subjects.module import ModuleSubject

    if not session.voice.writes_document:
        return
    before = ModuleSubject(session.model, observed=session.observe)
    after = None if changed is None else ModuleSubject(changed, session.known_inputs())
    _picture(session.voice, session.loaded.reference, before, after)
    if session.voice.model is not None and session.inputs is not None:
        session.voice.model["input"] = session.inputs.shapes()


def picture_onnx(voice: Voice, source: Path) -> None:
    """An ONNX file."""
    from bntool.subjects.onnx import OnnxSubject

    if voice.writes_document:
        _picture(voice, source.name, OnnxSubject(source))


def _picture(voice: Voice, reference: str, before: Subject, after: Subject | None = None) -> None:
    """Only where somebody reads a document; a model that cannot be looked at is not in it."""
    if not voice.writes_document:
        return
    from bntool.results.picture import norms_of

    picture: dict[str, Any] = {"reference": reference}
    with contextlib.suppress(BntoolError):
        picture |= {"before": _side(before), "norms": norms_of(before.graph()), "norms_of": "before"}
        if after is not None:
            picture["after"] = _side(after)
            norms = norms_of(after.graph())
            if len(norms) > len(picture["norms"]):
                picture |= {"norms": norms, "norms_of": "after"}
    voice.model = picture


def _side(subject: Subject) -> dict[str, Any]:
    """One side of the picture, with as many layers as a summary counts."""
    from bntool.results.picture import layers_of

    return layers_of(subject.graph(), len(subject.counted().layers))
