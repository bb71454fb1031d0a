"""`bntool export`: parse, call, print."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from bntool.cli.concluding import conclude
from bntool.cli.opening import open_model
from bntool.cli.options import takes_all
from bntool.cli.session import Voice
from bntool.core.command_options import LoadOptions, ModelOptions, RealOptions, SpeechOptions, WriteOptions
from bntool.core.options import CheckOptions, ExportOptions, PlaceOptions


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that the command takes."""

    model: ModelOptions
    load: LoadOptions
    real: RealOptions
    export: ExportOptions
    write: WriteOptions
    place: PlaceOptions
    check: CheckOptions
    speech: SpeechOptions


@click.command("export", short_help="Write a model as ONNX and verify it.")
@takes_all(Asked, without=("dry_run", "repro"))
def command(voice: Voice, asked: Asked) -> int:
    """Write a model as ONNX, as it is (no folding), and verify it against torch.

    An ONNX file is converted to another --opset, and verified against itself as it was.
    """
    opened = open_model(voice, asked.model.model, asked.load, asked.export, asked.place, but="export")
    from bntool.cli import serving
    from bntool.cli.devices import require_places
    from bntool.cli.onnx_export import export_file
    from bntool.cli.writing import OnnxPlace
    from bntool.export.dynamic_axes import DynamicAxes
    from bntool.files.sidecar import output_name
    from bntool.graph.dataflow import READS_NUMBERS
    from bntool.pipeline.serving import Serving, placed
    from bntool.pipeline.surgeries import unchanged
    from bntool.results.checks import checks_text
    from bntool.subjects.base import Checking

    opened = opened.on(asked.real, asked.load, full=asked.check.check == "full").exportable(asked.export)
    if not opened.subject.on_torch:
        return export_file(voice, opened, asked)
    if asked.export.dtype == "float32" and opened.session is not None:
        opened = opened.cast("float32")
    devices = require_places(asked.place, onnx_too=True)
    wanted = Path(asked.write.output or output_name(opened.source, "export"))
    place = OnnxPlace(wanted, voice.target.claim(wanted), asked.export.keep_unverified)
    subject, axes = opened.subject, asked.export.axes()
    DynamicAxes(asked=axes).named_for(subject.example())
    checking = Checking.of(
        asked.check, onnx_device=devices.onnx, seed=asked.load.seed, axes=axes, inputs=opened.inputs
    )
    pair = None if checking is None else (subject.proof(checking).reference, checking)
    if pair is None:
        voice.note("not verified (--check none)")
    how = Serving(asked.export, source_hash=opened.source_hash)
    if subject.kind == "module" and subject.graph().reads_numbers:
        voice.note(READS_NUMBERS)
    with voice.target.drafts() as drafts:
        result = serving.served(voice, (unchanged(subject), subject), place, how, pair, drafts, repro=None)
    result = placed(result, place.named, place.path, drafts)
    assert result.export is not None
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
