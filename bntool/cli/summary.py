"""`bntool summary`: parse, call, print."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from bntool.cli.opening import open_model
from bntool.cli.options import takes
from bntool.cli.session import Session, Voice
from bntool.core.command_options import LoadOptions, ModelOptions, SpeechOptions
from bntool.core.errors import BntoolError
from bntool.core.option import Options, option


@dataclasses.dataclass(frozen=True)
class SummaryOptions(Options):
    """What a summary compares with."""

    baseline: str | None = option(None, "Compare with this model.", metavar="MODEL", names="file")


@click.command("summary", short_help="Layers, shapes, trainable / frozen / buffers; before and after.")
@takes(ModelOptions, LoadOptions, SummaryOptions, SpeechOptions)
def command(
    voice: Voice, model: ModelOptions, load: LoadOptions, summary: SummaryOptions, speech: SpeechOptions
) -> int:
    """Show a model's layers, shapes and exact counts; after insert or fold, the difference too."""
    opened = open_model(voice, model.model, load, summary, stand_ins=True)
    session = opened.session
    if session is None or opened.kind == "program":
        from bntool.report.program_summary import summarize_onnx, summarize_program

        subject = opened.subject
        tensors = summarize_onnx(subject.observed) if session is None else summarize_program(subject.model)
        voice.say(tensors.render(verbose=not speech.quiet))
        voice.emit({"status": "ok", "kind": opened.kind, **tensors.to_dict()})
        return 0
    from bntool.inserting import redundant_biases
    from bntool.report.summary import summarize

    before = _baseline(session, summary.baseline, load)
    inputs, idle = session.inputs, []
    with voice.progress("running the model"):
        try:
            observation = session.observe()
            inputs = observation.inputs
            idle = [dropped.conv for dropped in redundant_biases(observation.graph)]
        except BntoolError as error:
            # Shapes that the user gave must fit; those from elsewhere may fail, which the summary says.
            if load.inputs:
                raise
            if inputs is None:
                voice.note(f"shapes are left out: {error.what}")
        found = summarize(session.model, inputs, baseline=before, idle_biases=idle)
    voice.say(found.render(verbose=not speech.quiet))
    voice.emit({"status": "ok", "kind": opened.kind, **found.to_dict()})
    return 0


def _baseline(session: Session, named: str | None, load: LoadOptions) -> Any:
    """The model to compare with: the one named, else what the last command made this one from."""
    if named:
        return session.load_other(named, load)
    if not session.baseline:
        return None
    try:
        model = session.load_recorded(session.baseline, session.baseline_load)
    except BntoolError as error:
        session.voice.note(f"no comparison with {session.baseline}: {error.what}")
        return None
    shown = os.path.relpath(session.baseline) if Path(session.baseline).is_file() else session.baseline
    session.voice.tell(f"compared with {shown}")
    return model
