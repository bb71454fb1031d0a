"""`bntool verify`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import CheckFailed, LoadError, UsageError

if TYPE_CHECKING:
    from bntool.reference import Reference
    from bntool.verdicts import Check


@click.command("verify", short_help="Compare two models, or a model and an ONNX file.")
@click.argument("candidate", required=True, callback=opt.not_empty)
@opt.model_options()
@opt.device_option()
@opt.check_option()
@opt.tolerance_options()
@opt.common_options()
def command(candidate: str, **options: Any) -> int:
    """Compare CANDIDATE (a model, or an .onnx file) with MODEL, against MODEL's own rounding noise."""
    voice = Voice(options["as_json"], options["quiet"], options["verbose"])
    if options["check"] == "none":
        raise UsageError("--check none leaves nothing to verify", next_step="use --check full or fast")
    is_onnx = _is_onnx(candidate)
    session = open_session(voice, options)
    from bntool.cli import serving
    from bntool.cli.program_file import runnable, with_runnable_program
    from bntool.report.checks import checks_text

    if session.program is not None:
        session = with_runnable_program(session, session.program, options)
    serving.require_device(options["device"], torch_too=not is_onnx, onnx_too=is_onnx)
    other = None if is_onnx else runnable(session.load_other(candidate, options), options)
    if session.loaded.kind != "program":
        session.observe()
    reference = serving.reference_with(session, full=options["check"] == "full")
    with voice.progress("comparing") as step:
        checks = _compared(session, other or Path(candidate), reference, options, step)
    voice.say(checks_text(checks))
    document = {"status": "ok", "checks": [check.to_dict() for check in checks]}
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        voice.fail(_mismatch(failed, candidate, session.loaded.reference), document)
    voice.emit(document)
    return 0


def _is_onnx(candidate: str) -> bool:
    from bntool.files.detect import Kind, detect

    path = Path(candidate)
    if not path.is_file():
        if path.suffix == ".onnx":
            raise LoadError(f"no such file: {candidate}", next_step="bntool export MODEL writes one")
        return False
    return detect(path).kind is Kind.ONNX


def _compared(
    session: Session, other: Any, reference: Reference, options: dict[str, Any], step: Any
) -> list[Check]:
    from bntool.checking import check_onnx, check_surgery
    from bntool.cli import serving

    common: dict[str, Any] = {
        "progress": step,
        "reference": reference,
        "atol": options["atol"],
        "rtol": options["rtol"],
    }
    if isinstance(other, Path):
        return check_onnx(session.model, other, reference.inputs, device=options["device"], **common)
    device = serving.torch_device(options["device"])
    return check_surgery(session.model, other, reference.inputs, stage="verify", device=device, **common)


def _mismatch(check: Check, candidate: str, reference: str) -> CheckFailed:
    return CheckFailed(
        f"{candidate} does not compute what {reference} computes: "
        f"relative error {check.relative:.2g}, allowed {check.limit:.2g}",
        where=f"{check.stage}: output {check.worst[0]} on {check.provider} ({check.device})",
        next_step="look at the table; --atol and --rtol set another limit",
    )
