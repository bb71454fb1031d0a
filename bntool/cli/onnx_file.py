"""`bntool fold model.onnx`: the same engine on the file's own graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bntool.cli.session import Voice
from bntool.errors import CheckFailed, NothingToDo, UsageError
from bntool.files.detect import Kind, detect
from bntool.files.drafts import draft_folder
from bntool.files.sidecar import output_name

if TYPE_CHECKING:
    from bntool.files.targets import Drafts
    from bntool.plan import Plan


_OTHER_KINDS = frozenset({".pt", ".pth", ".pt2", ".safetensors"})


def is_onnx(name: str | None) -> bool:
    return bool(name) and Path(str(name)).is_file() and detect(str(name)).kind is Kind.ONNX


def onnx_target(
    voice: Voice, source: Path, options: dict[str, Any], action: Literal["fold", "insert"]
) -> tuple[Path, Path]:
    """Where the new file goes, as named and really; refused where it cannot, or where its name misleads."""
    from bntool.onnx_files import open_onnx

    target = Path(options["output"]) if options["output"] else output_name(source, action)
    if target.suffix in _OTHER_KINDS:
        raise UsageError(
            f"{target.name}: the output is saved as the same kind as the input (ONNX)",
            next_step=f"name it {target.stem}.onnx",
        )
    if options["dry_run"]:
        return target, target
    voice.target.read(*open_onnx(source).files)
    return target, voice.target.claim(target)


@contextlib.contextmanager
def onnx_drafts(voice: Voice, path: Path, options: dict[str, Any]) -> Iterator[tuple[Path, Drafts | None]]:
    """A folder for a draft of `path`, and where it is to be put; elsewhere, and nowhere, for a dry run."""
    if options["dry_run"]:
        with draft_folder(None) as folder:
            yield folder, None
        return
    with voice.target.drafts() as drafts:
        yield drafts.folder_for(path), drafts


def fold_onnx_file(voice: Voice, options: dict[str, Any]) -> int:
    """Fold an ONNX file, compare it with the original in ONNX Runtime, and only then put it into place."""
    from bntool.cli import devices, timing
    from bntool.cli.picturing import picture_onnx
    from bntool.onnx_checking import example_inputs_of
    from bntool.onnx_files import put_onnx
    from bntool.onnx_folding import fold_onnx
    from bntool.report.checks import checks_text
    from bntool.results import fold_lines, fold_verdicts, merges_of

    source = Path(options["model"])
    _require_no_export(options)
    devices.require_places(options, onnx_too=True)
    target, path = onnx_target(voice, source, options, "fold")
    chosen: dict[str, Any] = {
        "include": options["include"] or ("*",),
        "exclude": options["exclude"],
        "merge": not options["no_merge"],
        "unshare": options["unshare"],
        "device": options["onnx_device"],
        "seed": options["seed"],
    }
    with onnx_drafts(voice, path, options) as (folder, drafts):
        try:
            with voice.progress(f"folding {source.name}"):
                result = fold_onnx(source, folder / path.name, **chosen, check=options["check"])
        except CheckFailed:
            _blame(voice, source, folder / "blamed.onnx", chosen, options)
            raise
        for note in result.plan.notes:
            voice.note(note)
        voice.say(*fold_lines(result.plan, None, not options["quiet"]))
        require_folded(result.plan, source, options["require_all"])
        picture_onnx(voice, source, result.path)
        if options["check"] == "none":
            voice.note("not verified (--check none)")
        latency = {}
        if options["bench"] and result.path is not None:
            inputs_of = functools.partial(example_inputs_of, source, seed=options["seed"])
            latency = timing.timed_pair(voice, (source, result.path), inputs_of, options)
        if drafts is not None and result.path is not None:
            put_onnx(result.path, result.data_path, path, drafts)
    counts = result.counts
    voice.say()
    voice.say(f"nodes       {counts.nodes_before:,} -> {counts.nodes_after:,}")
    voice.say(f"numbers     {counts.numbers_before:,} -> {counts.numbers_after:,}")
    voice.say()
    voice.say(checks_text(result.checks))
    if not options["dry_run"]:
        voice.say(f"wrote       {target}")
    voice.emit(
        {
            "status": "ok",
            "output": None,
            "onnx": None if options["dry_run"] else str(target),
            **fold_verdicts(result.plan),
            "merges": merges_of(result.plan),
            "parameters": result.to_dict()["counts"],
            "checks": [check.to_dict() for check in result.checks],
            "dry_run": options["dry_run"],
            **latency,
        }
    )
    return 0


def _require_no_export(options: dict[str, Any]) -> None:
    """The file is folded as it is: what says how a model is to be written has nothing to say here."""
    given = {
        "--opset": options["opset"],
        "--ir-version": options["ir_version"],
        "--static-batch": options["static_batch"],
        "--dynamic": options["dynamic"],
        "--external-data": options["external_data"] != "auto",
        "--keep-io": options["keep_io"],
        "--exporter": options["exporter"] != "dynamo",
        "--keep-unverified": options["keep_unverified"],
        "--atol": options["atol"] is not None,
        "--rtol": options["rtol"] is not None,
        "--tf32": options["tf32"] != "off",
    }
    for name in (name for name, value in given.items() if value):
        raise UsageError(
            f"{name} is for a model that is exported, and an ONNX file is folded as it is",
            where=options["model"],
            next_step="leave it out; bntool verify A B compares two files with --atol, --rtol and --tf32",
        )


def _blame(voice: Voice, source: Path, folded: Path, chosen: dict[str, Any], options: dict[str, Any]) -> None:
    """Fold once more without a check, and say where the two files part."""
    from bntool.blaming import Found, blame_files
    from bntool.cli import blaming
    from bntool.onnx_folding import fold_onnx
    from bntool.onnx_verifying import seeded_file_inputs

    def find() -> Found | None:
        result = fold_onnx(source, folded, **chosen, check="none")
        inputs = seeded_file_inputs(source, (1,), options["seed"])
        return blame_files(source, result.path, inputs) if result.path is not None else None

    blaming.report(voice, find, options)


def require_folded(plan: Plan, source: Path, require_all: bool) -> None:
    """Raise what keeps a plan of a graph's own from being worth an output."""
    from bntool.onnx_folding import require_good_statistics

    skips = plan.skips
    require_good_statistics(plan, source)
    if not plan or (require_all and skips):
        what = f"{len(skips)} BatchNorm layers stay" if skips else "the file has no BatchNorm"
        first = f"bntool explain {skips[0].reason}" if skips else "there is nothing to do for this file"
        raise NothingToDo(what, where=str(source), next_step=first)
