"""`bntool insert model.onnx`: identity nodes in the file's own graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.onnx_file import onnx_drafts, onnx_target
from bntool.cli.session import Voice
from bntool.errors import CheckFailed, NothingToDo, UsageError

if TYPE_CHECKING:
    from bntool.inserting import InsertOptions
    from bntool.onnx_insertion import OnnxInsertResult
    from bntool.verdicts import Check


def insert_onnx_file(voice: Voice, options: dict[str, Any], chosen: InsertOptions) -> int:
    """Insert, compare with the original in ONNX Runtime to the last bit, and only then put it into place."""
    from bntool.cli.picturing import picture_onnx
    from bntool.onnx_files import put_onnx
    from bntool.onnx_insertion import insert_onnx
    from bntool.report.checks import checks_text
    from bntool.results import insert_lines

    if chosen.init != "identity" or options["plan_file"]:
        raise UsageError(
            "an ONNX file takes identity nodes only",
            where=options["model"],
            next_step="insert into the PyTorch model with --init calibrate or --plan, and export that",
        )
    source = Path(options["model"])
    target, path = onnx_target(voice, source, options, "insert")
    with onnx_drafts(voice, path, options) as (folder, drafts):
        with voice.progress(f"inserting into {source.name}"):
            result = insert_onnx(source, folder / path.name, chosen)
        voice.say(*insert_lines(result.plan, None, not options["quiet"]))
        if not result.modified:
            raise NothingToDo(
                f"no place for a BatchNorm among {len(result.plan.skips)} layers",
                where=str(source),
                next_step=f"bntool explain {result.plan.skips[0].reason}" if result.plan.skips else "",
            )
        picture_onnx(voice, source, result.path)
        checks = _checked(voice, source, result, options)
        if drafts is not None and result.path is not None:
            put_onnx(result.path, result.data_path, path, drafts)
    if checks:
        voice.say()
        voice.say(checks_text(checks))
    if not options["dry_run"]:
        voice.say(f"wrote       {target}")
    plan = result.plan.to_dict()
    voice.emit(
        {
            "status": "ok",
            "output": None if options["dry_run"] else str(target),
            "sites": plan["sites"],
            "skips": plan["skips"],
            "check": checks[0].to_dict() if checks else None,
            "dry_run": options["dry_run"],
        }
    )
    return 0


def _checked(voice: Voice, source: Path, result: OnnxInsertResult, options: dict[str, Any]) -> list[Check]:
    from bntool.onnx_checking import check_onnx_unchanged, example_inputs_of

    if options["check"] == "none" or result.path is None:
        voice.note("not verified (--check none)")
        return []
    batches = (1, 2, 3) if options["check"] == "full" else (1,)
    with voice.progress("comparing both files"):
        inputs = [example_inputs_of(source, batch, options["seed"]) for batch in batches]
        check = check_onnx_unchanged(source, result.path, inputs)
    if not check.passed:
        raise CheckFailed(
            f"the new file differs by {check.max_abs:.3g}",
            where=f"output {check.worst[0]}",
            next_step="please report this file",
        )
    return [check]
