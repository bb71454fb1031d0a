"""From a model to a file that is served: export it, fold what its graph alone allows, and verify it there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from bntool.core.errors import CheckFailed, ExportError
from bntool.core.options import ExportOptions, FoldOptions
from bntool.core.plan_parts import unshared_text
from bntool.core.reasons import Reason
from bntool.core.verdicts import Check, first_failed
from bntool.core.version import __version__
from bntool.export.exporting import ExportResult
from bntool.export.onnx_writing import append_metadata
from bntool.files.drafting import Drafts
from bntool.observe.wrappers import model_inside
from bntool.pipeline.onnx_folding import fold_exported
from bntool.precision.casting import DTYPES, stored_as
from bntool.results.results import SurgeryResult
from bntool.subjects.base import Checking, Subject
from bntool.verifying.blaming import Found, blame_onnx
from bntool.verifying.export_checking import check_onnx
from bntool.verifying.reference import Reference


class Teller(Protocol):
    """Who is told what is done."""

    def note(self, text: str) -> None:
        """A remark."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        """Work that may take a while; yields what takes the text of its present step."""


class Silent:
    """Nobody."""

    def note(self, text: str) -> None: ...

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Callable[[str], None]]:  # noqa: ARG002 - nobody hears it
        yield lambda text: None


class StageFailed(CheckFailed):
    """A stage of a check failed: all rows, and what finds the node at fault where one can be told."""

    checks: tuple[Check, ...] = ()
    find: Callable[[], Found | None] | None = None


@dataclasses.dataclass(frozen=True)
class Serving:
    """What the file is to be.

    Args:
        how: the options of the export.
        fold: how to fold what a module tree cannot express and the graph can; None leaves the graph as it is.
        source_hash: sha256 of what the model was read from, for the file's metadata.
    """

    how: ExportOptions = dataclasses.field(default_factory=ExportOptions)
    fold: FoldOptions | None = None
    source_hash: str = ""


def served(
    after: Subject,
    result: SurgeryResult,
    path: Path,
    serving: Serving,
    checking: tuple[Reference, Checking] | None,
    tell: Teller,
) -> SurgeryResult:
    """Write the model of a result as ONNX to a new file at `path`, and hold it to the original.

    The result has the export and its checks. With `checking` (the original's own runs, and how) the file
    runs twice: as it is written, and as ONNX Runtime optimises it. Where merged branches do not stand up,
    they stay as they are, and a note says so.

    Raises:
        StageFailed: the file does not compute the same.
        ExportError: the model cannot be exported, or the file does not run.
    """
    merge = serving.fold is not None and serving.fold.merge
    export = exported(after, result, path, serving, tell, merge=merge)
    try:
        rows = _checked(after, result, path, serving, checking, tell, blame=not export.merged)
    except StageFailed as failure:
        if not export.merged:
            raise
        tell.note(f"parallel branches are left as they are: {failure.what}")
        export = exported(after, result, path, serving, tell, merge=False)
        rows = _checked(after, result, path, serving, checking, tell)
    checks = (*result.checks, *rows)
    append_metadata(export.path, {"bntool_checks": _told(checks)})
    return dataclasses.replace(result, checks=checks, export=export)


def placed(result: SurgeryResult, named: Path, path: Path, drafts: Drafts) -> SurgeryResult:
    """The result, once the drafts are in their places: its file is at `path`, which the user has `named`."""
    if result.export is None:
        return result
    export = dataclasses.replace(result.export, path=named, data_path=drafts.part_of(path))
    return dataclasses.replace(result, export=export)


def exported(
    after: Subject,
    result: SurgeryResult,
    path: Path,
    serving: Serving,
    tell: Teller,
    *,
    merge: bool = False,
) -> ExportResult:
    """The file, with what its graph lets fold; unchecked."""
    with tell.progress("exporting to ONNX"):
        export = after.export(path, serving.how, _metadata(result, serving.source_hash))
        if serving.fold is not None:
            stay = (Reason.EXCLUDED, Reason.NOT_PROVED)
            prefix = model_inside(after.runnable)[1]
            keep = [skip.name.removeprefix(prefix) for skip in result.skips if skip.reason in stay]
            export = fold_exported(export, keep, merge=merge, unshare=bool(serving.fold.unshare))
    for name, layers in export.folded.items():
        tell.note(f"{name} is folded in the ONNX graph, into {', '.join(layers)}")
    if export.merged:
        first, branches = next(iter(export.merged.items()))
        tell.note(
            f"{len(export.merged)} convolutions of the ONNX graph are merged branches, "
            f"the first: {first} of {len(branches)} parallel convolutions"
        )
    if export.unshared.layers:
        tell.note(f"{unshared_text(export.unshared)}, in the ONNX graph")
    for note in export.notes:
        tell.note(note)
    return export


def _metadata(result: SurgeryResult, source_hash: str) -> Mapping[str, str]:
    data = {
        "bntool_version": __version__,
        "bntool_source_sha256": source_hash,
        "bntool_folded": ",".join(site.bn for site in result.plan.fold_sites),
        "bntool_kept": ",".join(f"{skip.name}:{skip.reason}" for skip in result.skips),
    }
    return {key: value for key, value in data.items() if value}


def _checked(
    after: Subject,
    result: SurgeryResult,
    path: Path,
    serving: Serving,
    checking: tuple[Reference, Checking] | None,
    tell: Teller,
    *,
    blame: bool = True,
) -> list[Check]:
    """The export and runtime stages; in half precision nobody looks for the node at fault."""
    if checking is None:
        return []
    reference, how = checking
    dtype = DTYPES.get(serving.how.narrow)
    if dtype is not None:
        reference = reference.in_arithmetic(stored_as(dtype))
    try:
        with tell.progress("verifying the ONNX file") as step:
            rows = check_onnx(reference, path, dataclasses.replace(how, step=step).on_onnx())
    except ExportError as error:
        if dtype is not None:
            error.next_step = "verify on a device that runs it (--device cuda), or write it with --check none"
        raise
    failed = first_failed(rows)
    if failed is None:
        return rows
    failure = StageFailed(
        f"the {failed.stage} stage differs: {failed.figures}",
        where=f"output {failed.worst[0]} on {failed.provider} ({failed.device})",
        next_step="see the table above; nothing was written",
    )
    failure.checks = (*result.checks, *rows)
    if blame and dtype is None:
        failure.find = partial(blame_onnx, after.runnable, path, reference.inputs, rows)
    raise failure


def _told(checks: Sequence[Check]) -> str:
    """The verdicts for the file's metadata, without figures: those wobble from machine to machine."""
    rows = [
        f"{c.stage} {c.precision}".strip() + f": {c.verdict} on {c.provider}" for c in checks if c.decides
    ]
    return "; ".join(rows) or "none"
