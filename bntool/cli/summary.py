"""`bntool summary`: parse, call, print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import BntoolError


@click.command("summary", short_help="Layers, shapes, trainable / frozen / buffers; before and after.")
@opt.model_options()
@click.option("--baseline", metavar="MODEL", callback=opt.not_empty, help="Compare with this model.")
@opt.common_options()
def command(**options: Any) -> int:
    """Show a model's layers, shapes and exact counts; after insert or fold, the difference too."""
    voice = Voice.of(options)
    session = open_session(voice, options, stand_ins=True)
    if session.program is not None:
        from bntool.cli.program_file import summarize_program_file

        return summarize_program_file(session, session.program, options)
    from bntool.inserting import redundant_biases
    from bntool.report.summary import summarize

    before = _baseline(session, options)
    inputs, idle = session.inputs, []
    with voice.progress("running the model"):
        try:
            observation = session.observe()
            inputs = observation.inputs
            idle = [dropped.conv for dropped in redundant_biases(observation.graph)]
        except BntoolError as error:
            # Shapes that the user gave must fit; those from elsewhere may fail, which the summary says.
            if options["inputs"]:
                raise
            if inputs is None:
                voice.note(f"shapes are left out: {error.what}")
        found = summarize(session.model, inputs, baseline=before, idle_biases=idle)
    voice.say(found.render(verbose=not options["quiet"]))
    voice.emit({"status": "ok", **found.to_dict()})
    return 0


def _baseline(session: Session, options: dict[str, Any]) -> Any:
    """The model to compare with: the one named, else what the last command made this one from."""
    if options["baseline"]:
        return session.load_other(options["baseline"], options)
    if not session.baseline:
        return None
    try:
        model = session.load_recorded(session.baseline, **session.baseline_options)
    except BntoolError as error:
        session.voice.note(f"no comparison with {session.baseline}: {error.what}")
        return None
    shown = os.path.relpath(session.baseline) if Path(session.baseline).is_file() else session.baseline
    session.voice.tell(f"compared with {shown}")
    return model
