"""`bntool export`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Voice, open_session
from bntool.errors import InvariantError


@click.command("export", short_help="Write a model as ONNX and verify it.")
@opt.model_options()
@opt.export_options()
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), help="Cast the ONNX file's numbers.")
@opt.output_option()
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@opt.device_option()
@opt.providers_option()
@opt.tf32_option()
@opt.check_option()
@opt.tolerance_options()
@opt.common_options()
def command(**options: Any) -> int:
    """Write a model as ONNX, as it is (no folding), and verify it against torch."""
    voice = Voice.of(options)
    session = open_session(voice, options)
    from bntool import surgeries

    if session.loaded.kind == "script":
        from bntool.cli.script_file import with_converted_script

        session = with_converted_script(session)
    from bntool.cli import devices, serving
    from bntool.files.sidecar import output_name
    from bntool.report.checks import checks_text

    devices.require_places(options, onnx_too=True)
    source = session.loaded.path or session.loaded.reference
    wanted = Path(options["output"]) if options["output"] else output_name(source, "export")
    onnx = serving.chosen_onnx(wanted, voice.target, options)
    session.observe()
    serving.require_axes(session, options)
    result = surgeries.unchanged(session.model)
    reference = serving.reference_of(session, options)
    with voice.target.drafts() as drafts:
        result, export = serving.exported(session, result, reference, onnx, drafts, options)
    export = serving.placed(export, onnx, drafts)
    if export is None:
        raise InvariantError("a target was given, and nothing was exported")
    voice.say(checks_text(result.checks))
    voice.say(f"wrote       {serving.export_text(export)}")
    voice.emit(
        {
            "status": "ok",
            "onnx": str(onnx.named),
            "export": export.to_dict(),
            "checks": [check.to_dict() for check in result.checks],
        }
    )
    return 0
