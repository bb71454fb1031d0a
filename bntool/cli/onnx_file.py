"""`bntool fold model.onnx`: the same engine on the file's own graph."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.errors import CheckFailed, NothingToDo, StateError
from bntool.files.atomic import require_writable
from bntool.files.detect import Kind, detect
from bntool.files.sidecar import output_name
from bntool.reasons import Reason

if TYPE_CHECKING:
    from bntool.onnx_folding import OnnxFoldResult
    from bntool.plan import Plan
    from bntool.verdicts import Check


def is_onnx(name: str | None) -> bool:
    return bool(name) and Path(str(name)).is_file() and detect(str(name)).kind is Kind.ONNX


def fold_onnx_file(voice: Voice, options: dict[str, Any]) -> int:
    """Fold an ONNX file, compare it with the original in ONNX Runtime, and only then put it into place."""
    from bntool.cli import serving
    from bntool.onnx_files import move_onnx
    from bntool.report.checks import checks_text
    from bntool.results import merges_of

    source = Path(options["model"])
    serving.require_device(options["device"], torch_too=False, onnx_too=True)
    target = Path(options["output"]) if options["output"] else output_name(source, "fold")
    if not options["dry_run"]:
        require_writable(target, force=options["force"], forbid=(source,))
    with tempfile.TemporaryDirectory(dir=_folder(target, options), prefix=".fold.") as folder:
        merge = not options["no_merge"]
        result = _folded(voice, source, Path(folder) / target.name, options, merge)
        try:
            checks = _checked(voice, source, result, options)
        except CheckFailed as failure:
            if not result.plan.merges:
                raise
            voice.note(f"parallel branches are left as they are: {failure.what}")
            result = _folded(voice, source, Path(folder) / target.name, options, False)
            checks = _checked(voice, source, result, options)
        if not options["dry_run"] and result.path is not None:
            move_onnx(result.path, result.data_path, target)
    counts = result.counts
    voice.say()
    voice.say(f"nodes       {counts.nodes_before:,} -> {counts.nodes_after:,}")
    voice.say(f"numbers     {counts.numbers_before:,} -> {counts.numbers_after:,}")
    voice.say()
    voice.say(checks_text(checks))
    if not options["dry_run"]:
        voice.say(f"wrote       {target}")
    plan = result.plan.to_dict()
    voice.emit(
        {
            "status": "ok",
            "output": None,
            "onnx": None if options["dry_run"] else str(target),
            "sites": [{k: v for k, v in site.items() if k != "edits"} for site in plan["sites"]],
            "skips": plan["skips"],
            "merges": merges_of(result.plan),
            "bn_total": len(plan["sites"]) + len(plan["skips"]),
            "bn_folded": len(plan["sites"]),
            "unshared": result.plan.unshared.to_dict(),
            "parameters": result.to_dict()["counts"],
            "checks": [check.to_dict() for check in checks],
            "dry_run": options["dry_run"],
        }
    )
    return 0


def _folded(voice: Voice, source: Path, target: Path, options: dict[str, Any], merge: bool) -> OnnxFoldResult:
    from bntool.onnx_folding import fold_onnx
    from bntool.results import fold_lines

    with voice.progress(f"folding {source.name}"):
        result = fold_onnx(
            source,
            target,
            include=options["include"] or ("*",),
            exclude=options["exclude"],
            merge=merge,
            unshare=options["unshare"],
            force=True,
        )
    voice.say("\n".join(fold_lines(result.plan, None, not options["quiet"])))
    require_folded(result.plan, source, options["require_all"])
    return result


def _folder(target: Path, options: dict[str, Any]) -> Path | None:
    """Beside the target, so that the move is one rename; anywhere where nothing is to be kept."""
    return None if options["dry_run"] else target.resolve().parent


def require_folded(plan: Plan, source: Path, require_all: bool) -> None:
    """Raise what keeps a plan of a graph's own from being worth an output."""
    skips = plan.skips
    bad = next((skip for skip in skips if skip.reason is Reason.BAD_STATISTICS), None)
    if bad is not None:
        raise StateError(
            f"the statistics of BatchNorm {bad.name} are bad: {bad.detail}",
            where=str(source),
            next_step=f"export the model again, or leave it out with --exclude {bad.name}",
        )
    if not plan or (require_all and skips):
        what = f"{len(skips)} BatchNorm layers stay" if skips else "the file has no BatchNorm"
        first = f"bntool explain {skips[0].reason}" if skips else "there is nothing to do for this file"
        raise NothingToDo(what, where=str(source), next_step=first)


def _checked(voice: Voice, source: Path, result: OnnxFoldResult, options: dict[str, Any]) -> list[Check]:
    from bntool.onnx_checking import check_onnx_fold, example_inputs_of

    if options["check"] == "none" or result.path is None:
        voice.note("not verified (--check none)")
        return []
    batches = (1, 2, 3) if options["check"] == "full" else (1,)
    with voice.progress("comparing both files"):
        inputs = [example_inputs_of(source, batch, options["seed"]) for batch in batches]
        checks = check_onnx_fold(
            source, result.path, inputs, result.counts.nodes_before, device=options["device"]
        )
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        raise CheckFailed(
            f"the folded file differs: relative error {failed.relative:.2g}, allowed {failed.limit:.2g}",
            where=f"output {failed.worst[0]} on {failed.provider} ({failed.stage})",
            next_step="leave BatchNorms out with --exclude to find the one at fault, and please report it",
        )
    return checks
