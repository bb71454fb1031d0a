"""`bntool export`: parse, call, print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from bntool.cli.concluding import conclude
from bntool.cli.opening import open_model
from bntool.cli.options import takes_all
from bntool.cli.session import Voice
from bntool.core.command_options import LoadOptions, ModelOptions, SpeechOptions, WriteOptions
from bntool.core.errors import InvariantError, UsageError
from bntool.core.option import Options, option
from bntool.core.options import CheckOptions, ExportOptions, PlaceOptions
from bntool.core.refusals import KINDS


@dataclasses.dataclass(frozen=True)
class AskOptions(Options):
    """What the file's numbers are."""

    dtype: Literal["fp16", "bf16"] | None = option(None, "Cast the ONNX file's numbers.")


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that the command takes."""

    model: ModelOptions
    load: LoadOptions
    export: ExportOptions
    ask: AskOptions
    write: WriteOptions
    place: PlaceOptions
    check: CheckOptions
    speech: SpeechOptions


@click.command("export", short_help="Write a model as ONNX and verify it.")
@takes_all(Asked, without=("dry_run", "repro"))
def command(voice: Voice, asked: Asked) -> int:
    """Write a model as ONNX, as it is (no folding), and verify it against torch."""
    opened = open_model(
        voice, asked.model.model, asked.load, asked.export, asked.place, asked.ask, but="export"
    )
    from bntool.cli import serving
    from bntool.cli.devices import require_places
    from bntool.cli.writing import OnnxPlace
    from bntool.export.dynamic_axes import DynamicAxes
    from bntool.files.sidecar import output_name
    from bntool.graph.dataflow import READS_NUMBERS
    from bntool.pipeline.serving import Serving
    from bntool.pipeline.surgeries import unchanged
    from bntool.report.checks import checks_text
    from bntool.subjects.base import Checking

    if opened.kind == "onnx":
        raise UsageError(
            f"{opened.subject.name} is {KINDS['onnx']} already",
            next_step=f"bntool fold {opened.subject.name}, or bntool verify {opened.subject.name}",
        )
    if asked.export.keep_io and not asked.ask.dtype:
        raise UsageError("--keep-io goes with --dtype", next_step="add --dtype fp16, or leave --keep-io out")
    opened = opened.exportable()
    devices = require_places(asked.place, onnx_too=True)
    wanted = Path(asked.write.output) if asked.write.output else output_name(opened.source, "export")
    place = OnnxPlace(wanted, voice.target.claim(wanted), asked.export.keep_unverified)
    subject = opened.subject
    DynamicAxes(asked=asked.export.axes()).named_for(subject.example())
    checking = Checking.of(
        asked.check, onnx_device=devices.onnx, seed=asked.load.seed, axes=asked.export.axes()
    )
    pair = None if checking is None else (subject.proof(checking).reference, checking)
    how = Serving(asked.export, asked.ask.dtype or "", source_hash=opened.source_hash)
    if pair is None:
        voice.note("not verified (--check none)")
    if subject.kind == "module" and subject.graph().reads_numbers:
        voice.note(READS_NUMBERS)
    with voice.target.drafts() as drafts:
        result = serving.served(voice, (unchanged(subject), subject), place, how, pair, drafts, repro=None)
    result = serving.placed(result, place, drafts)
    if result.export is None:
        raise InvariantError("a target was given, and nothing was exported")
    voice.say(checks_text(result.checks))
    voice.say(f"wrote       {serving.export_text(result.export)}")
    document = {
        "status": "ok",
        "kind": opened.kind,
        "onnx": str(place.named),
        "export": result.export.to_dict(),
        "checks": [row.to_dict() for row in result.checks],
    }
    return conclude(voice, document, result.checks, model=opened.source, new=place.named)
