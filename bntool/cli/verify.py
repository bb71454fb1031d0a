"""`bntool verify`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.completing import files
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import CheckFailed, LoadError, UsageError

if TYPE_CHECKING:
    from bntool.blaming import Found
    from bntool.reference import Reference
    from bntool.verdicts import Check


@click.command("verify", short_help="Compare any two models or ONNX files; blame what differs.")
@click.argument("candidate", required=True, callback=opt.not_empty, shell_complete=files)
@opt.model_options()
@click.option(
    "--inputs",
    "inputs_file",
    metavar="FILE",
    shell_complete=files,
    callback=opt.not_empty,
    help="Real inputs: an .npy, .npz or .pt file.",
)
@opt.device_option()
@opt.providers_option()
@opt.tf32_option()
@opt.check_option()
@opt.tolerance_options()
@opt.repro_option()
@opt.report_option()
@opt.common_options()
def command(candidate: str, **options: Any) -> int:
    """Compare CANDIDATE with MODEL, against MODEL's own rounding noise.

    Each is a PyTorch model, an exported program or an ONNX file. Without MODEL, CANDIDATE is compared with
    what the last command here wrote; an ONNX file of another name with itself, at every optimisation level.
    """
    voice = Voice.of(options)
    if options["check"] == "none":
        raise UsageError("--check none leaves nothing to verify", next_step="use --check full or fast")
    from bntool.cli import blaming

    blaming.require_place(options["repro"])
    if _is_onnx(candidate) and (_is_onnx(options["model"]) or _stands_alone(candidate, options)):
        from bntool.cli.verify_files import verify_files

        other = Path(options["model"]) if options["model"] else None
        return _concluded(voice, candidate, str(other or "it without optimisations"),
                          *verify_files(voice, Path(candidate), other, options))  # fmt: skip
    if options["model"] and _is_onnx(options["model"]):
        voice.note(f"{candidate} runs in float64, so the noise floor is its own")
        candidate, options["model"] = options["model"], candidate
    options["arch"] = options["arch"] or _arch_of_both(candidate, options["model"], voice)
    session = open_session(voice, options)
    return _concluded(voice, candidate, session.loaded.reference, *_checked(session, candidate, options))


def _arch_of_both(candidate: str, model: str | None, voice: Voice) -> str | None:
    """The architecture in CANDIDATE's side file where MODEL, the file that it was made from, has none."""
    from bntool.cli.loading import recorded_architecture

    if model is None or not Path(model).is_file() or recorded_architecture(model):
        return None
    arch = recorded_architecture(candidate)
    if arch:
        voice.note(f"--arch {arch}, as the side file of {candidate} says")
    return arch


def _checked(session: Session, candidate: str, options: dict[str, Any]) -> tuple[list[Check], dict[str, Any]]:
    from bntool.cli import blaming, devices, picturing
    from bntool.cli.program_file import runnable, with_runnable_program
    from bntool.verdicts import first_failed

    is_onnx = _is_onnx(candidate)
    if session.program is not None:
        session = with_runnable_program(session, session.program, options)
    devices.require_places(options, torch_too=not is_onnx, onnx_too=is_onnx)
    other = None if is_onnx else runnable(session.load_other(candidate, options), options)
    if session.loaded.kind != "program":
        session.observe()
    reference = _reference(session, options)
    with session.voice.progress("comparing") as step:
        checks = _compared(session, other or Path(candidate), reference, options, step)
    if session.loaded.kind != "program":
        picturing.picture_module(session)
    if first_failed(checks) is None:
        return checks, {}

    def find() -> Found | None:
        from bntool.blaming import blame_modules, blame_onnx

        if other is None:
            return blame_onnx(session.model, Path(candidate), reference.inputs, checks)
        return blame_modules(session.model, other, reference.inputs, stage="verify")

    return checks, blaming.report(session.voice, find, options)


def _concluded(
    voice: Voice, candidate: str, reference: str, checks: list[Check], blame: dict[str, Any]
) -> int:
    from bntool.report.checks import checks_text
    from bntool.verdicts import first_failed

    voice.say(checks_text(checks))
    scores = [check.top1 for check in checks if check.top1 is not None]
    if scores:
        voice.say(f"the same class comes first for {min(scores):.2%} of the samples")
    document = {"status": "ok", "checks": [check.to_dict() for check in checks], **blame}
    failed = first_failed(checks)
    if failed is not None:
        voice.fail(_mismatch(failed, candidate, reference), document)
    voice.emit(document)
    return 0


def _stands_alone(candidate: str, options: dict[str, Any]) -> bool:
    """Whether an ONNX file without MODEL is not the export of what the last command here wrote."""
    from bntool.files.memory import recall

    if options["model"]:
        return False
    record, path = recall(Path.cwd()), Path(candidate).resolve()
    return record is None or Path(record.output).resolve().with_suffix("") != path.with_suffix("")


def _reference(session: Session, options: dict[str, Any]) -> Reference:
    from bntool.cli import serving
    from bntool.cli.real_inputs import read_inputs
    from bntool.reference import Reference

    full = options["check"] == "full"
    if not options["inputs_file"]:
        return serving.reference_with(session, full=full)
    return Reference(session.model, read_inputs(options["inputs_file"], session.example, full=full))


def _is_onnx(candidate: str | None) -> bool:
    from bntool.files.detect import Kind, detect

    if candidate is None:
        return False
    path = Path(candidate)
    if not path.is_file():
        if path.suffix == ".onnx":
            raise LoadError(f"no such file: {candidate}", next_step="bntool export MODEL writes one")
        return False
    return detect(path).kind is Kind.ONNX


def _compared(
    session: Session, other: Any, reference: Reference, options: dict[str, Any], step: Any
) -> list[Check]:
    from bntool.checking import check_onnx, check_surgery, check_tf32, no_tf32
    from bntool.cli import devices

    common: dict[str, Any] = {
        "progress": step,
        "reference": reference,
        "twice": True,
        "atol": options["atol"],
        "rtol": options["rtol"],
    }
    if isinstance(other, Path):
        both = {"device": options["onnx_device"], "tf32": options["tf32"] == "both"}
        return check_onnx(session.model, other, reference.inputs, **both, **common)
    device = devices.torch_device(options["device"])
    rows = check_surgery(session.model, other, reference.inputs, stage="verify", device=device, **common)
    if options["tf32"] == "both":
        missing = no_tf32(device, reference.eps)
        if missing:
            session.voice.note(missing)
        else:
            rows.append(check_tf32(other, reference, device=device))
    return rows


def _mismatch(check: Check, candidate: str, reference: str) -> CheckFailed:
    return CheckFailed(
        f"{candidate} does not compute what {reference} computes: {check.figures}",
        where=f"{check.stage}: output {check.worst[0]} on {check.provider} ({check.device})",
        next_step="look at the table; --atol and --rtol set another limit",
    )
