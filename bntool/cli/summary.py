"""`bntool summary`: parse, call, print."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from bntool.cli.opening import is_onnx, open_model
from bntool.cli.options import takes
from bntool.cli.session import Session, Voice
from bntool.core.command_options import LoadOptions, ModelOptions, RealOptions, SpeechOptions, ViewOptions
from bntool.core.errors import BntoolError, NeedsArchitecture, UsageError
from bntool.core.option import Options, option


@dataclasses.dataclass(frozen=True)
class SummaryOptions(Options):
    """What a summary compares with."""

    baseline: str | None = option(
        None, "Compare with this model, of whatever kind.", metavar="MODEL", names="file"
    )


@click.command("summary", short_help="Layers, shapes, parameters, mult-adds, memory; before and after.")
@takes(ModelOptions, LoadOptions, RealOptions, SummaryOptions, ViewOptions, SpeechOptions)
def command(
    voice: Voice,
    model: ModelOptions,
    load: LoadOptions,
    real: RealOptions,
    summary: SummaryOptions,
    view: ViewOptions,
    speech: SpeechOptions,
) -> int:
    """Show a model's layers, shapes, exact counts and costs; after insert or fold, the difference too."""
    found, baseline = _summarized(voice, model.model, load, real, summary)
    if baseline is not None:
        from bntool.results.summary import since

        found = since(found, baseline)
    found = dataclasses.replace(found, view=view)
    voice.say(found.render(verbose=not speech.quiet))
    voice.notes += map(str, found.notes)
    document = {"status": "ok", "kind": found.kind, **found.to_dict()}
    if load.inputs and found.failure:
        error = UsageError(
            f"the model does not run on {found.input_text}: {found.failure}",
            next_step="give a size that it takes with --input",
        )
        voice.fail(error, document)
    voice.emit(document)
    return 0


def _summarized(
    voice: Voice, name: str | None, load: LoadOptions, real: RealOptions, summary: SummaryOptions
) -> tuple[Any, Any]:
    """The summaries of the model and of what it is compared with, where there is that."""
    from bntool.pipeline.summarising import summarized

    opened = open_model(voice, name, load, real, summary, but="summary", stand_ins=True)
    if not opened.subject.runs:
        voice.tell(opened.subject.why)
    opened = opened.on(real, load, full=False)
    session = opened.session
    with voice.progress("running the model"):
        found = summarized(opened.subject, session.inputs if session is not None else None)
    return found, _baseline(voice, session, summary.baseline, load)


def _baseline(voice: Voice, session: Session | None, named: str | None, load: LoadOptions) -> Any:
    """The summary of the model named, else of what the last command made this one from; None without one."""
    if named:
        return _counted(voice, named, lambda: _load(voice, session, named, load))
    if session is None or not session.baseline:
        return None
    try:
        found = _counted(
            voice, session.baseline, lambda: session.load_recorded(session.baseline, session.baseline_load)
        )
    except BntoolError as error:
        voice.note(f"no comparison with {session.baseline}: {error.what}")
        return None
    shown = os.path.relpath(session.baseline) if Path(session.baseline).is_file() else session.baseline
    voice.tell(f"compared with {shown}")
    return found


def _load(voice: Voice, session: Session | None, named: str, load: LoadOptions) -> Any:
    if session is not None:
        return session.load_other(named, load)
    from bntool.cli.loading import load_granted

    trusted = LoadOptions(allow=load.allow, trust_pickle=load.trust_pickle, max_size=load.max_size)
    return load_granted(named, None, trusted, voice)[0].model


def _counted(voice: Voice, name: str, loaded: Any) -> Any:
    """The summary of a second model, without running it."""
    from bntool.subjects import subject_of, weights_of

    if is_onnx(name):
        subject = subject_of(name)
        voice.target.read(*subject.files)
        return subject.counted()
    try:
        return subject_of(loaded()).counted()
    except NeedsArchitecture as error:
        return weights_of(Path(name), error).counted()
