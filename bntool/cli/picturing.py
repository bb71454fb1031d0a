"""The model in the document of a command: its layers before and after, and what its BatchNorms compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Session, Voice
from bntool.errors import BntoolError

if TYPE_CHECKING:
    from torch import nn

    from bntool.graph import Graph


def picture_module(session: Session, changed: nn.Module | None = None) -> None:
    """The model of the session, and what a surgery made of it."""
    from bntool.observe.eager import observe

    after = None if changed is None else lambda: observe(changed, session.example).graph
    _picture(session.voice, session.loaded.reference, lambda: session.observe().graph, after)
    if session.voice.model is not None and session.inputs is not None:
        session.voice.model["input"] = session.inputs.shapes()


def picture_onnx(voice: Voice, source: Path, changed: Path | None = None) -> None:
    """The same of ONNX files; an axis that is open has a size of our own choosing."""
    after = None if changed is None else lambda: _read_onnx(changed)
    _picture(voice, source.name, lambda: _read_onnx(source), after)


def picture_program(session: Session, changed: Any = None) -> None:
    """The same of exported programs."""
    from bntool.observe.exported_program import observe_program

    after = None if changed is None else lambda: observe_program(changed).graph
    before = session.program
    assert before is not None
    _picture(session.voice, session.loaded.reference, lambda: observe_program(before).graph, after)


def _read_onnx(path: Path) -> Graph:
    from bntool.observe.onnx_model import observe_onnx
    from bntool.onnx_files import open_onnx

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
