"""`bntool verify`: parse, call, print."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntool.cli.opening import require_one
from bntool.cli.options import takes
from bntool.cli.session import Session, Voice, open_session, same_file
from bntool.core.command_options import LoadOptions, RealOptions, ReportOptions, SpeechOptions
from bntool.core.errors import CheckFailed, LoadError, UsageError
from bntool.core.option import Options, option
from bntool.core.options import CheckOptions, PlaceOptions

if TYPE_CHECKING:
    from bntool.cli.devices import Devices
    from bntool.core.verdicts import Check
    from bntool.verifying.blaming import Found
    from bntool.verifying.reference import Reference


_ITSELF = "it without optimisations"


@dataclasses.dataclass(frozen=True)
class VerifyOptions(Options):
    """What is compared."""

    first: str | None = option(None, "", argument=True, names="file", metavar="[REFERENCE]")
    second: str | None = option(None, "", argument=True, names="file", metavar="CANDIDATE")


@click.command("verify", short_help="Compare any two models or ONNX files; blame what differs.")
@takes(
    VerifyOptions,
    LoadOptions,
    RealOptions,
    PlaceOptions,
    CheckOptions,
    ReportOptions,
    SpeechOptions,
)
def command(
    voice: Voice,
    verify: VerifyOptions,
    load: LoadOptions,
    real: RealOptions,
    place: PlaceOptions,
    check: CheckOptions,
) -> int:
    """Compare CANDIDATE with REFERENCE, against the reference's own rounding noise.

    Each is a PyTorch model, an exported program or an ONNX file. Without REFERENCE, CANDIDATE is compared
    with what the last command here wrote; an ONNX file of another name with itself, at every optimisation
    level.
    """
    if check.check == "none":
        raise UsageError("--check none leaves nothing to verify", next_step="use --check full or fast")
    from bntool.cli import blaming

    blaming.require_place(check.repro)
    require_one(real, load)
    if verify.first is None:
        raise UsageError("no CANDIDATE is named", next_step="bntool verify model_bn.pt model_bn_folded.onnx")
    other, candidate = (verify.first, verify.second) if verify.second else (None, verify.first)
    if other is None and not _is_onnx(candidate):
        other, load = _made_from(candidate, load, voice)
    elif other is not None and same_file(other, candidate):
        raise UsageError(
            f"{other} and {candidate} are one file, which proves nothing",
            next_step="name the model that it was made from, and what was made of it",
        )
    if _is_onnx(candidate) and (_is_onnx(other) or _stands_alone(candidate, other)):
        from bntool.cli.verify_files import verify_files

        file = Path(other) if other else None
        found = verify_files(voice, Path(candidate), file, load, place, check, real.inputs_file)
        return _concluded(voice, candidate, str(file or _ITSELF), *found)
    if other and _is_onnx(other):
        voice.note(f"{candidate} runs in float64, so the noise floor is its own")
        candidate, other = other, candidate
    load = dataclasses.replace(load, arch=load.arch or _arch_of_both(candidate, other, voice))
    session = open_session(voice, other, load)
    found = _checked(session, candidate, load, place, check, real.inputs_file)
    return _concluded(voice, candidate, session.loaded.reference, *found)


def _made_from(candidate: str, load: LoadOptions, voice: Voice) -> tuple[str | None, LoadOptions]:
    """What the last command here made CANDIDATE from, where it did; else what it wrote (None)."""
    from bntool.files.memory import recall

    record = recall(Path.cwd())
    if record is None or not record.source or not same_file(candidate, record.output):
        return None, load
    voice.tell(f"compared with {record.source}, from which the last bntool {record.command} made it")
    load = dataclasses.replace(
        load,
        arch=load.arch or record.arch,
        weights=load.weights or record.weights,
        key=load.key or record.key,
    )
    return record.source, load


def _arch_of_both(candidate: str, model: str | None, voice: Voice) -> str | None:
    """The architecture in CANDIDATE's side file where MODEL, the file that it was made from, has none."""
    from bntool.cli.loading import recorded_architecture

    if model is None or not Path(model).is_file() or recorded_architecture(model):
        return None
    arch = recorded_architecture(candidate)
    if arch:
        voice.note(f"--arch {arch}, as the side file of {candidate} says")
    return arch


def _checked(
    session: Session,
    candidate: str,
    load: LoadOptions,
    place: PlaceOptions,
    check: CheckOptions,
    inputs_file: str | None,
) -> tuple[list[Check], dict[str, Any]]:
    from bntool.cli import blaming, devices, picturing
    from bntool.cli.opening import of_session
    from bntool.cli.real_inputs import session_inputs
    from bntool.core.verdicts import first_failed
    from bntool.subjects import subject_of
    from bntool.verifying.checking import seeded_batches
    from bntool.verifying.reference import Reference

    full, is_onnx = check.check == "full", _is_onnx(candidate)
    given = session_inputs(session, inputs_file, full=full)[1] if inputs_file else None
    if session.program is not None:
        devices.require_cpu(place.device)
        # Named providers are about the ONNX file, and say where it runs.
        place = place if place.providers else dataclasses.replace(place, device="cpu")
    places = devices.require_places(place, torch_too=not is_onnx, onnx_too=is_onnx)
    subject = of_session(session).subject
    other = None if is_onnx else subject_of(session.load_other(candidate, load))
    if other is not None and other.kind == "program":
        devices.require_cpu(place.device)
        places = dataclasses.replace(places, torch="cpu")
    several = (1, 2, 3) if full else (1,)
    reference = Reference(subject.runnable, given or seeded_batches(subject.example(), several, session.seed))
    with session.voice.progress("comparing") as step:
        checks = _compared(
            session, Path(candidate) if other is None else other.runnable, reference, check, places, step
        )
    if session.loaded.kind != "program":
        picturing.picture_module(session)
    if first_failed(checks) is None:
        return checks, {}

    def find() -> Found | None:
        from bntool.verifying.blaming import blame_modules, blame_onnx

        if other is None:
            return blame_onnx(subject.runnable, Path(candidate), reference.inputs, checks)
        return blame_modules(subject.runnable, other.runnable, reference.inputs, stage="verify")

    return checks, blaming.report(session.voice, find, check.repro)


def _concluded(
    voice: Voice, candidate: str, reference: str, checks: list[Check], blame: dict[str, Any]
) -> int:
    from bntool.cli.concluding import conclude
    from bntool.core.verdicts import first_failed, told_limits
    from bntool.results.checks import checks_text

    voice.say(checks_text(checks))
    for line in told_limits(checks):
        voice.say(line)
    scores = [check.top1 for check in checks if check.top1 is not None]
    if scores:
        voice.say(f"the same class comes first for {min(scores):.2%} of the samples")
    document = {"status": "ok", "checks": [check.to_dict() for check in checks], **blame}
    failed = first_failed(checks)
    if failed is not None:
        voice.fail(_mismatch(failed, candidate, reference), document)
    model = "" if reference == _ITSELF else reference
    return conclude(voice, document, checks, model=model, new=Path(candidate))


def _stands_alone(candidate: str, model: str | None) -> bool:
    """Whether an ONNX file without MODEL is not the export of what the last command here wrote."""
    from bntool.files.memory import recall

    if model:
        return False
    record, path = recall(Path.cwd()), Path(candidate).resolve()
    return record is None or Path(record.output).resolve().with_suffix("") != path.with_suffix("")


def _is_onnx(candidate: str | None) -> bool:
    from bntool.files.detect import Kind, detect

    if candidate is None:
        return False
    path = Path(candidate)
    if not path.is_file():
        if path.suffix == ".onnx":
            raise LoadError(f"no such file: {candidate}", next_step="bntool export MODEL writes one")
        return False
    found = detect(path)
    if path.suffix == ".onnx" and found.kind in (Kind.UNKNOWN, Kind.TEXT, Kind.EMPTY):
        step = "download or export it again"
        raise LoadError(f"{candidate} is {found.description}", where=candidate, next_step=step)
    return found.kind is Kind.ONNX


def _compared(
    session: Session, other: Any, reference: Reference, check: CheckOptions, places: Devices, step: Any
) -> list[Check]:
    from bntool.cli import devices
    from bntool.verifying.checking import check_surgery
    from bntool.verifying.conditions import Conditions
    from bntool.verifying.export_checking import check_onnx
    from bntool.verifying.tf32 import check_tf32, no_tf32

    tf32 = check.tf32 == "both"
    how = functools.partial(Conditions, tolerance=check.tolerance, twice=True, progress=step)
    if isinstance(other, Path):
        return check_onnx(reference, other, how(places.onnx, tf32=tf32))
    device = devices.torch_device(places.torch)
    rows = check_surgery(reference, other, stage="verify", how=how(device))
    if tf32:
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
