"""`bntool fold`: parse, call, print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bntool.cli import options as opt
from bntool.cli.blaming import require_place
from bntool.cli.completing import files
from bntool.cli.onnx_file import fold_onnx_file, is_onnx
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import BntoolError, NothingToDo, StateError, UsageError
from bntool.reasons import Reason

if TYPE_CHECKING:
    from bntool.results import SurgeryResult


@click.command("fold", short_help="Fold BatchNorm into the weights; export and verify.")
@opt.model_options()
@click.option("--export", "export_to", type=click.Choice(["onnx"]), help="Write it as ONNX too.")
@opt.export_options()
@click.option("--no-merge", is_flag=True, help="Leave parallel branches as they are.")
@click.option("--unshare", is_flag=True, help="Clone a shared layer for each call that needs it changed.")
@click.option("--require-all", is_flag=True, help="Fail (exit 4) if any BatchNorm that runs is kept.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "fp16", "bf16"]),
    help="fp16, bf16: cast the ONNX file's numbers. float32: cast the model first, where float16 cannot hold "
    "the folded weights.",
)
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    shell_complete=files,
    callback=opt.not_empty,
    help="Fold a file of weights by the plan of an earlier fold, layer by layer, without the model.",
)
@click.option("--bench", is_flag=True, help="Time the model before and after.")
@opt.bench_options()
@opt.pattern_options()
@opt.output_options()
@opt.device_option()
@opt.providers_option()
@opt.tf32_option()
@opt.check_option()
@opt.tolerance_options()
@opt.repro_option()
@opt.report_option()
@opt.common_options()
def command(**options: Any) -> int:
    """Fold every BatchNorm that algebra allows into the weights beside it, for inference.

    Writes NAME_folded beside the input, with --export onnx also NAME_folded.onnx. Every BatchNorm gets
    a verdict; what is kept is kept for a reason (bntool explain CODE).
    """
    voice = Voice.of(options)
    require_place(options["repro"])
    if options["plan_file"]:
        from bntool.cli.stored import fold_stored_file

        return fold_stored_file(voice, options)
    if is_onnx(options["model"]):
        _require_own_types(options, "an ONNX file")
        return fold_onnx_file(voice, options)
    session = open_session(voice, options)
    if session.program is not None:
        from bntool.cli.program_file import fold_program_file

        _require_own_types(options, "an exported program")
        return fold_program_file(session, session.program, options)
    if session.loaded.kind == "script":
        from bntool.cli.script_file import fold_script_file

        return fold_script_file(session, options)
    if options["dtype"] == "float32":
        session.cast(options["dtype"])
    from bntool.cli import devices, picturing, serving, timing, writing
    from bntool.files.sidecar import output_name
    from bntool.report.checks import checks_text
    from bntool.report.latency import latency_text

    devices.require_places(options, torch_too=True, onnx_too=bool(options["export_to"]))
    place = path = onnx = None
    if not options["dry_run"]:
        place = writing.chosen_output(session, "fold", options["output"])
        path = place.named
        if options["export_to"]:
            onnx = serving.chosen_onnx(output_name(path, "export"), voice.target, options)
    serving.require_axes(session, options)
    if serving.narrow(options["dtype"]) and not options["export_to"]:
        raise UsageError("--dtype fp16 and bf16 are for the ONNX file", next_step="add --export onnx")
    result = _folded(session, options)
    refusal = _refusal(result, session, options)
    reference = serving.reference_of(session, options)
    if reference is None:
        voice.note("not verified (--check none)")
    elif refusal is None:
        result = serving.proved(session, reference, options)
        refusal = _refusal(result, session, options)
    picturing.picture_module(session, result.model if result.modified else None)
    voice.say(result.render(verbose=not options["quiet"]))
    if refusal is not None:
        voice.fail(refusal, {**result.to_dict(), "output": None, "onnx": None})
    record = None
    with voice.target.drafts() as drafts:
        result, export = serving.exported(session, result, reference, onnx, drafts, options)
        if export is not None and options["require_all"]:
            _require_no_node(export.nodes.get("BatchNormalization", 0), session)
        if place is not None:
            record = writing.draft_model(session, "fold", result, place, drafts)
    export = serving.placed(export, onnx, drafts)
    writing.keep_in_mind(session, record)
    voice.say()
    voice.say(checks_text(result.checks))
    if path is not None:
        voice.say(f"wrote       {path}")
    if export is not None:
        voice.say(f"wrote       {serving.export_text(export)}")
    onnx_path = onnx.path if onnx else None
    latency = timing.timed_fold(session, result, onnx_path, options) if options["bench"] else None
    if latency is not None:
        voice.say()
        voice.say(latency_text(latency))
    voice.emit(
        {
            **result.to_dict(),
            # what the graph alone folded is something done too
            **({"status": "ok"} if export and export.folded else {}),
            "output": str(path) if path else None,
            "onnx": str(onnx.named) if onnx else None,
            "export": export.to_dict() if export else None,
            "dry_run": options["dry_run"],
            **({"latency": latency.to_dict()} if latency else {}),
        }
    )
    return 0


def _require_own_types(options: dict[str, Any], kind: str) -> None:
    """A graph names the type of every value in it: it cannot be cast as a module can."""
    if options["dtype"]:
        raise UsageError(
            f"--dtype is for PyTorch modules: {kind} keeps its types",
            where=options["model"] or "",
            next_step="fold the PyTorch model with --dtype, and --export onnx",
        )


def _folded(session: Session, options: dict[str, Any]) -> SurgeryResult:
    from bntool import surgeries

    with session.voice.progress("folding"):
        return surgeries.fold_observed(
            session.model,
            session.observe(),
            include=options["include"] or ("*",),
            exclude=options["exclude"],
            merge=not options["no_merge"],
            unshare=options["unshare"],
        )


def _require_no_node(count: int, session: Session) -> None:
    if count:
        raise NothingToDo(
            f"--require-all: the ONNX graph keeps {count} BatchNormalization nodes",
            where=session.loaded.reference,
            next_step="bntool fold without --require-all says why each stays",
        )


def _refusal(result: SurgeryResult, session: Session, options: dict[str, Any]) -> BntoolError | None:
    """Why this result is not worth writing, if it is not."""
    where = session.loaded.reference
    bad = [s for s in result.skips if s.reason is Reason.BAD_STATISTICS]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return StateError(
            f"the statistics of BatchNorm {bad[0].name} are bad{more}: {bad[0].detail}",
            where=where,
            next_step=f"train or calibrate the model again, or leave it out with --exclude {bad[0].name}",
        )
    # what a module tree cannot express the exported graph may: a functional BatchNorm is no part of the
    # tree, the one of an identity branch reads what others read, and a layer that is called twice from one
    # place cannot be two
    in_graph = {Reason.FUNCTIONAL} if options["export_to"] else set()
    if options["export_to"] and not options["no_merge"]:
        in_graph |= {Reason.OUTPUT_USED_ELSEWHERE, Reason.REACHES_INPUT}
    if options["export_to"] and options["unshare"]:
        in_graph |= {Reason.CALLED_MORE_THAN_ONCE, Reason.WEIGHT_SHARED}
    kept = [s for s in result.skips if s.reason not in {Reason.NOT_OBSERVED, *in_graph}]
    if not result.sites and not any(skip.reason in in_graph for skip in result.skips):
        return _nothing_to_fold(result, where)
    if options["require_all"] and kept:
        return NothingToDo(
            f"--require-all: {len(kept)} of {len(result.sites) + len(kept)} BatchNorm layers stay, "
            f"the first is {kept[0].name} [{kept[0].reason}]",
            where=where,
            next_step=f"bntool explain {kept[0].reason}",
        )
    return None


def _nothing_to_fold(result: SurgeryResult, where: str) -> NothingToDo:
    if not result.skips:
        return NothingToDo(
            "the model has no BatchNorm",
            where=where,
            next_step=f"bntool export {where} writes it as ONNX as it is",
        )
    if all(skip.reason is Reason.EXCLUDED for skip in result.skips):
        return NothingToDo(
            f"--include and --exclude leave out all {len(result.skips)} BatchNorm layers",
            where=where,
            next_step=f"their names are written like {result.skips[0].name}",
        )
    return NothingToDo(
        f"none of the {len(result.skips)} BatchNorm layers can be folded",
        where=where,
        next_step=f"bntool explain {result.skips[0].reason}",
    )
