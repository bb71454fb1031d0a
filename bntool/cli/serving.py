"""Export into a draft, verify it there, and say where it stands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool.cli.session import Voice
from bntool.core.errors import CheckFailed, ExportError
from bntool.results.checks import checks_text
from bntool.results.tables import size

if TYPE_CHECKING:
    from bntool.cli.writing import OnnxPlace
    from bntool.export.exporting import ExportResult
    from bntool.files.drafting import Drafts
    from bntool.pipeline.serving import Serving
    from bntool.results.results import SurgeryResult
    from bntool.subjects.base import Checking
    from bntool.verifying.reference import Reference


def served(
    voice: Voice,
    done: tuple[SurgeryResult, Any],
    place: OnnxPlace,
    how: Serving,
    checking: tuple[Reference, Checking] | None,
    drafts: Drafts,
    *,
    repro: str | None,
) -> SurgeryResult:
    """Export a result into a draft and verify it there; the file goes to its place with the other drafts."""
    from bntool.cli import blaming
    from bntool.files.onnx_files import put_onnx
    from bntool.pipeline.serving import StageFailed, served

    result, after = done
    draft = drafts.folder_for(place.path) / place.path.name
    with _keeping_unverified(draft, place):
        try:
            result = served(after, result, draft, how, checking, voice)
        except StageFailed as failure:
            voice.say(checks_text(failure.checks))
            if failure.find is not None:
                blaming.report(voice, failure.find, repro)
            raise
    if result.export is not None:
        put_onnx(result.export.path, result.export.data_path, place.path, drafts)
    return result


def export_text(export: ExportResult) -> str:
    """The file, its size, and what it needs to be loaded."""
    total = export.path.stat().st_size + (export.data_path.stat().st_size if export.data_path else 0)
    nodes = sum(export.nodes.values())
    left = export.nodes.get("BatchNormalization", 0)
    batch_norms = f"{left} BatchNormalization" if left else "no BatchNormalization"
    dtype = f", {export.dtype}" if export.dtype else ""
    loads = f", loads in ONNX Runtime >= {export.loads_in}" if export.loads_in else ""
    return (
        f"{export.path} ({size(total)}, opset {export.opset}, IR {export.ir_version}, "
        f"{nodes} nodes, {batch_norms}{dtype}{loads})"
    )


@contextlib.contextmanager
def _keeping_unverified(draft: Path, place: OnnxPlace) -> Iterator[None]:
    """Where the check of a draft fails, keep it if the user asked for that, under a name that says so."""
    from bntool.files.onnx_files import open_onnx, save_onnx

    try:
        yield
    except (CheckFailed, ExportError) as error:
        error.where = error.where.replace(str(draft), str(place.named))
        if place.keep_unverified and draft.exists():
            names = (place.named.with_suffix(f".unverified{(n and f'.{n}') or ''}.onnx") for n in range(1000))
            kept = next(name for name in names if not os.path.lexists(name))
            save_onnx(open_onnx(draft), kept)
            error.next_step = f"kept as {kept}: do not serve it"
        raise
