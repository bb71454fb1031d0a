"""The model in the document of a command: its layers before and after, and what its BatchNorms compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Session, Voice
from bntool.core.errors import BntoolError

if TYPE_CHECKING:
    from torch import nn

    from bntool.cli.opening import Opened
    from bntool.graph.dataflow import Graph


def picture(voice: Voice, opened: Opened, after: Any = None) -> None:
    """The model that was opened, of whatever kind, and what a surgery made of it.

    An axis that a file leaves open has a size of our own choosing.
    """
    name = opened.subject.name if opened.session is not None else Path(opened.subject.name).name
    _picture(voice, name, opened.subject.graph, None if after is None else after.graph)
    session = opened.session
    if voice.model is not None and session is not None and session.inputs is not None:
        voice.model["input"] = session.inputs.shapes()


def picture_module(session: Session, changed: nn.Module | None = None) -> None:
    """The model of the session, and another on the same inputs."""
    from bntool.observe.eager import observe

    after = None if changed is None else lambda: observe(changed, session.example).graph
    _picture(session.voice, session.loaded.reference, lambda: session.observe().graph, after)
    if session.voice.model is not None and session.inputs is not None:
        session.voice.model["input"] = session.inputs.shapes()


def picture_onnx(voice: Voice, source: Path) -> None:
    """An ONNX file."""
    _picture(voice, source.name, lambda: _read_onnx(source), None)


def _read_onnx(path: Path) -> Graph:
    from bntool.files.onnx_files import open_onnx
    from bntool.observe.onnx_model import observe_onnx

    return observe_onnx(open_onnx(path).model).graph


def _picture(
    voice: Voice,
    reference: str,
    before: Callable[[], Graph],
    after: Callable[[], Graph] | None,
) -> None:
    """Only where somebody reads a document; a model that cannot be looked at is not in it."""
    if not voice.writes_document:
        return
    from bntool.report.picture import layers_of, norms_of

    picture: dict[str, Any] = {"reference": reference}
    with contextlib.suppress(BntoolError):
        graph = before()
        picture |= {"before": layers_of(graph), "norms": norms_of(graph), "norms_of": "before"}
        if after is not None:
            graph = after()
            picture["after"] = layers_of(graph)
            norms = norms_of(graph)
            if len(norms) > len(picture["norms"]):
                picture |= {"norms": norms, "norms_of": "after"}
    voice.model = picture
