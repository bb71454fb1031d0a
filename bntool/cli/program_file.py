"""The commands on a .pt2 file: the same engine, on the program's own graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool import __version__
from bntool.cli.session import Session
from bntool.errors import CheckFailed, DeviceError, NothingToDo, UsageError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bntool.exporting import ExportResult
    from bntool.inserting import InsertOptions
    from bntool.plan import Plan
    from bntool.verdicts import Check


@dataclasses.dataclass(frozen=True)
class _Changed:
    model: ExportedProgram
    plan: Plan
    parameters: dict[str, dict[str, int]]
    checks: tuple[Check, ...]


def fold_program_file(session: Session, program: ExportedProgram, options: dict[str, Any]) -> int:
    """Fold a program, run it beside the original, and only then write it; with `--export onnx` both files."""
    from bntool.benchmarking import rebatching
    from bntool.cli import serving, timing, writing
    from bntool.cli.onnx_file import require_folded
    from bntool.cli.picturing import picture_program
    from bntool.files.sidecar import output_name
    from bntool.onnx_files import put_onnx
    from bntool.program_folding import RunnableProgram, example_inputs_of, fold_program
    from bntool.report.checks import checks_text
    from bntool.report.counting import parameter_delta
    from bntool.results import delta_lines, fold_lines, fold_verdicts, merges_of

    voice = session.voice
    _require_cpu(options)
    _require_no_choice(options)
    if options["keep_unverified"] and not options["export_to"]:
        raise UsageError("--keep-unverified is for the ONNX file", next_step="add --export onnx")
    place = onnx = export = record = None
    if not options["dry_run"]:
        place = writing.chosen_output(session, "fold", options["output"])
        if options["export_to"]:
            onnx = serving.chosen_onnx(output_name(place.named, "export"), voice.target, options)
    with voice.progress(f"folding {session.loaded.reference}"):
        result = fold_program(
            program,
            include=options["include"] or ("*",),
            exclude=options["exclude"],
            merge=not options["no_merge"],
            unshare=options["unshare"],
            check=options["check"],
            atol=options["atol"],
            rtol=options["rtol"],
        )
    for note in result.plan.notes:
        voice.note(note)
    voice.say(*fold_lines(result.plan, None, not options["quiet"]))
    picture_program(session, result.program if result.modified else None)
    require_folded(result.plan, Path(session.loaded.reference), options["require_all"])
    if options["check"] == "none":
        voice.note("not verified (--check none)")
    parameters = parameter_delta(RunnableProgram(program), RunnableProgram(result.program))
    folded = _Changed(result.program, result.plan, parameters, result.checks)
    with voice.target.drafts() as drafts:
        if onnx is not None:
            draft = drafts.folder_for(onnx.path) / onnx.path.name
            with serving.keeping_unverified(draft, onnx):
                export, checks = _exported(session, folded, draft, options)
            folded = dataclasses.replace(folded, checks=(*folded.checks, *checks))
            put_onnx(export.path, export.data_path, onnx.path, drafts)
        if place is not None:
            record = writing.draft_model(session, "fold", folded, place, drafts)
    export = serving.placed(export, onnx, drafts)
    writing.keep_in_mind(session, record)
    voice.say()
    voice.say(*delta_lines(parameters))
    voice.say()
    voice.say(checks_text(folded.checks))
    if place is not None:
        voice.say(f"wrote       {place.named}")
    if export is not None:
        voice.say(f"wrote       {serving.export_text(export)}")
    latency = {}
    if options["bench"]:
        pair = RunnableProgram(program), RunnableProgram(result.program)
        latency = timing.timed_pair(
            voice, pair, rebatching(example_inputs_of(program, session.seed)), options
        )
    voice.emit(
        {
            "status": "ok",
            "output": str(place.named) if place else None,
            "onnx": str(onnx.named) if onnx else None,
            "export": export.to_dict() if export else None,
            **fold_verdicts(result.plan),
            "merges": merges_of(result.plan),
            "parameters": parameters,
            "checks": [check.to_dict() for check in folded.checks],
            "dry_run": options["dry_run"],
            **latency,
        }
    )
    return 0


def insert_program_file(
    session: Session, program: ExportedProgram, options: dict[str, Any], chosen: InsertOptions
) -> int:
    """Insert identity BatchNorms into a program, held to the last bit, and only then write it."""
    from bntool.cli import writing
    from bntool.cli.picturing import picture_program
    from bntool.program_folding import RunnableProgram
    from bntool.program_insertion import insert_program
    from bntool.report.counting import parameter_delta
    from bntool.results import delta_lines, insert_lines

    voice = session.voice
    if options["plan_file"] or options["source"]:
        raise UsageError("--plan and --source are for modules, and this is an exported program")
    place = None
    if not options["dry_run"]:
        place = writing.chosen_output(session, "insert", options["output"])
    with voice.progress(f"inserting into {session.loaded.reference}"):
        result = insert_program(program, chosen)
    voice.say(*insert_lines(result.plan, None, not options["quiet"]))
    if not result.modified:
        first = result.plan.skips[0].reason if result.plan.skips else None
        raise NothingToDo(
            f"no place for a BatchNorm among {len(result.plan.skips)} layers",
            where=session.loaded.reference,
            next_step=f"bntool explain {first}" if first else "name another MODEL",
        )
    picture_program(session, result.program)
    parameters = parameter_delta(RunnableProgram(program), RunnableProgram(result.program))
    inserted = _Changed(result.program, result.plan, parameters, result.checks)
    if place is not None:
        writing.write_model(session, "insert", inserted, place)
    voice.say()
    voice.say(*delta_lines(parameters))
    voice.say("output      unchanged to the last bit (cpu, 1 input, eval mode)")
    if place is not None:
        voice.say(f"wrote       {place.named}")
    plan = result.plan.to_dict()
    voice.emit(
        {
            "status": "ok",
            "output": str(place.named) if place else None,
            "sites": plan["sites"],
            "skips": plan["skips"],
            "parameters": parameters,
            "check": result.checks[0].to_dict(),
            "dry_run": options["dry_run"],
        }
    )
    return 0


def summarize_program_file(session: Session, program: ExportedProgram, options: dict[str, Any]) -> int:
    """Every parameter and buffer by qualified name, and how many BatchNorms there are."""
    from bntool.report.program_summary import summarize_program

    if options["baseline"]:
        raise UsageError(
            "--baseline compares nn.Modules, and this is an exported program",
            next_step="run bntool summary on each of the two files",
        )
    found = summarize_program(program)
    session.voice.say(found.render(verbose=not options["quiet"]))
    session.voice.emit({"status": "ok", **found.to_dict()})
    return 0


def with_runnable_program(session: Session, program: ExportedProgram, options: dict[str, Any]) -> Session:
    """The session with the program as a module that runs, on the example inputs of the program."""
    from bntool.program_folding import example_inputs_of

    loaded = dataclasses.replace(session.loaded, model=runnable(program, options))
    return dataclasses.replace(session, loaded=loaded, inputs=example_inputs_of(program, session.seed))


def runnable(model: nn.Module | ExportedProgram, options: dict[str, Any]) -> nn.Module:
    """The model itself, or a program as a module that runs."""
    from torch.export import ExportedProgram

    from bntool.program_folding import RunnableProgram

    if not isinstance(model, ExportedProgram):
        return model
    _require_cpu(options)
    return RunnableProgram(model)


def _require_cpu(options: dict[str, Any]) -> None:
    """A program names the device that it runs on in its own graph, and is loaded for the CPU."""
    if options["device"] not in ("auto", "cpu"):
        raise DeviceError(
            f"an exported program is checked on the CPU, and --device {options['device']} was asked for",
            next_step="leave --device out; bntool verify FILE.onnx checks its ONNX file on CUDA",
        )
    options["device"] = "cpu"


def _require_no_choice(options: dict[str, Any]) -> None:
    """A program brings its axes and its types, and was captured already."""
    given = {"--dynamic": options["dynamic"], "--dtype": options["dtype"], "--keep-io": options["keep_io"]}
    given["--exporter legacy"] = options["exporter"] == "legacy"
    for name in (name for name, value in given.items() if value):
        raise UsageError(
            f"{name} is for models, and this is an exported program",
            next_step="export the program anew with torch.export, in the form that you want",
        )


def _exported(
    session: Session, folded: _Changed, path: Path, options: dict[str, Any]
) -> tuple[ExportResult, list[Check]]:
    from bntool.checking import check_onnx, seeded_batches
    from bntool.exporting import export_program
    from bntool.onnx_folding import fold_exported
    from bntool.program_folding import RunnableProgram, example_inputs_of
    from bntool.reasons import Reason
    from bntool.verdicts import first_failed

    metadata = {"bntool_version": __version__, "bntool_source_sha256": session.loaded.source_hash}
    inputs = example_inputs_of(folded.model, session.seed)
    with session.voice.progress("exporting to ONNX"):
        keep = [
            skip.name for skip in folded.plan.skips if skip.reason in (Reason.EXCLUDED, Reason.NOT_PROVED)
        ]
        export = export_program(
            folded.model,
            inputs,
            path,
            opset=options["opset"],
            ir_version=options["ir_version"],
            external_data=options["external_data"],
            metadata=metadata,
        )
        export = fold_exported(export, keep, unshare=options["unshare"])
    for note in export.notes:
        session.voice.note(note)
    if options["check"] == "none":
        return export, []
    batches = [inputs] if options["check"] == "fast" else [inputs, *seeded_batches(inputs)]
    with session.voice.progress("verifying the ONNX file") as step:
        checks = check_onnx(
            RunnableProgram(folded.model),
            path,
            batches,
            device=options["device"],
            progress=step,
            tf32=options["tf32"] == "both",
            atol=options["atol"],
            rtol=options["rtol"],
        )
    failed = first_failed(checks)
    if failed is not None:
        from bntool.blaming import blame_onnx
        from bntool.cli import blaming

        runnable_program = RunnableProgram(folded.model)
        blaming.report(session.voice, lambda: blame_onnx(runnable_program, path, batches, checks), options)
        raise CheckFailed(
            f"the {failed.stage} stage differs: {failed.figures}",
            where=f"output {failed.worst[0]} on {failed.provider} ({failed.device})",
            next_step="nothing was written; leave BatchNorms out with --exclude to find the one at fault",
        )
    return export, checks
