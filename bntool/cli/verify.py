"""`bntool verify`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Voice, open_session
from bntool.errors import CheckFailed, LoadError


@click.command("verify", short_help="Compare two models, or a model and an ONNX file.")
@click.argument("candidate", required=True)
@opt.model_options()
@opt.device_option()
@opt.check_option()
@opt.tolerance_options()
@opt.common_options()
def command(candidate: str, **options: Any) -> int:
    """Compare CANDIDATE (a model, or an .onnx file) with MODEL, against MODEL's own rounding noise."""
    voice = Voice(options["as_json"], options["quiet"], options["verbose"])
    session = open_session(voice, options)
    from bntool.checking import check_onnx, check_surgery
    from bntool.cli import serving
    from bntool.files.detect import Kind, detect
    from bntool.files.loading import load

    path = Path(candidate)
    is_onnx = path.is_file() and detect(path).kind is Kind.ONNX
    if path.suffix == ".onnx" and not is_onnx:
        raise LoadError(f"{candidate} is not an ONNX file", next_step="name the file to compare with MODEL")
    session.observe()
    reference = serving.reference_of(session, {**options, "check": "full" if options["check"] == "full" else "fast"})
    assert reference is not None
    tolerance = {"atol": options["atol"], "rtol": options["rtol"]}
    with voice.progress("comparing") as step:
        if is_onnx:
            checks = check_onnx(
                session.model,
                path,
                reference.inputs,
                device=options["device"],
                progress=step,
                reference=reference,
                **tolerance,
            )
        else:
            other = load(
                candidate,
                arch=options["arch"],
                allow=(*options["allow"], *session.loaded.allow),
                trust_pickle=options["trust_pickle"],
            )
            checks = check_surgery(
                session.model,
                other.model,
                reference.inputs,
                stage="verify",
                device=serving.torch_device(options["device"]),
                progress=step,
                reference=reference,
                **tolerance,
            )
    voice.say(serving.checks_text(checks))
    passed = all(check.passed for check in checks)
    document = {"status": "ok" if passed else CheckFailed.status, "checks": [c.to_dict() for c in checks]}
    voice.emit(document)
    if not passed and not voice.as_json:
        voice.say(f"{candidate} does not compute what {session.loaded.reference} computes")
    return 0 if passed else CheckFailed.exit_code
