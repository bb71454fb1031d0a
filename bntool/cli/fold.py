"""`bntool fold`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntool.cli import options as opt
from bntool.cli.session import Session, Voice, open_session
from bntool.errors import NothingToDo, StateError
from bntool.reasons import Reason


@click.command("fold", short_help="Fold BatchNorm into the weights; export and verify.")
@opt.model_options()
@click.option("--export", "export_to", type=click.Choice(["onnx"]), help="Write the folded model as ONNX too.")
@click.option("--opset", type=int, help="ONNX opset (default: the lowest that works).")
@click.option("--static-batch", is_flag=True, help="Fix the batch size in the ONNX file.")
@click.option("--require-all", is_flag=True, help="Fail (exit 4) if any BatchNorm that runs is kept.")
@opt.pattern_options()
@opt.output_options()
@opt.device_option()
@opt.check_option()
@opt.tolerance_options()
@opt.common_options()
def command(**options: Any) -> int:
    """Fold every BatchNorm that algebra allows into the weights beside it, for inference.

    Writes NAME_folded beside the input, with --export onnx also NAME_folded.onnx. Every BatchNorm gets
    a verdict; what is kept is kept for a reason (bntool explain CODE).
    """
    voice = Voice(options["as_json"], options["quiet"], options["verbose"])
    session = open_session(voice, options)
    from bntool.cli import serving, writing

    path = onnx = None
    if not options["dry_run"]:
        path = writing.chosen_output(session, "fold", options["output"], options["force"])
        if options["export_to"]:
            onnx = serving.chosen_onnx(path.with_suffix(".onnx"), session, options["force"])
    result = _folded(session, options)
    voice.say(result.render(verbose=not options["quiet"]))
    _require(result, session, options["require_all"])
    reference = serving.reference_of(session, options)
    result = serving.check_folded(session, result, reference, options)
    with serving.exported(session, result, reference, onnx, options) as (result, export):
        if path is not None:
            writing.write_model(session, "fold", result, path, options["force"])
    voice.say()
    voice.say(serving.checks_text(result.checks))
    if path is not None:
        voice.say(f"wrote       {path}")
    if export is not None:
        voice.say(f"wrote       {serving.export_text(export)}")
    voice.emit(
        {
            **result.to_dict(),
            "output": str(path) if path else None,
            "onnx": str(onnx) if onnx else None,
            "export": export.to_dict() if export else None,
            "dry_run": options["dry_run"],
        }
    )
    return 0


def _folded(session: Session, options: dict[str, Any]) -> Any:
    from bntool import api

    with session.voice.progress("folding"):
        return api.fold_observed(
            session.model,
            session.observe(),
            include=options["include"] or ("*",),
            exclude=options["exclude"],
        )


def _require(result: Any, session: Session, require_all: bool) -> None:
    bad = [s for s in result.skips if s.reason is Reason.BAD_STATISTICS]
    where = session.loaded.reference
    if bad:
        raise StateError(
            f"{len(bad)} BatchNorm layers have bad statistics: {bad[0].name}: {bad[0].detail}",
            where=where,
            next_step="train or calibrate the model again, or leave the layer out with --exclude",
        )
    if not result.sites:
        total = len(result.skips)
        what = "the model has no BatchNorm" if not total else f"none of the {total} BatchNorm layers can be folded"
        raise NothingToDo(
            what, where=where, next_step=f"bntool export {Path(where).name} writes it as ONNX as it is"
        )
    kept = [s for s in result.skips if s.reason is not Reason.NOT_OBSERVED]
    if require_all and kept:
        raise NothingToDo(
            f"--require-all: {len(kept)} BatchNorm layers are kept, the first is {kept[0].name} [{kept[0].reason}]",
            where=where,
            next_step=f"bntool explain {kept[0].reason}",
        )
