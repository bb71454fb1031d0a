"""Check, export and verify, for the commands that end in a file that will be served."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntool import __version__
from bntool.cli.session import Session
from bntool.errors import CheckFailed, DeviceError, UsageError
from bntool.files.atomic import require_writable
from bntool.report.checks import checks_text
from bntool.report.tables import size

if TYPE_CHECKING:
    from bntool.exporting import ExportResult
    from bntool.reference import Reference
    from bntool.results import SurgeryResult
    from bntool.verdicts import Check


def chosen_onnx(path: Path, session: Session, force: bool) -> Path:
    """The ONNX file, after making sure that it and its data file may be written."""
    require_writable(path, force=force, forbid=session.loaded.files)
    require_writable(path.with_name(path.name + ".data"), force=force)
    return path


def reference_of(session: Session, options: dict[str, Any]) -> Reference | None:
    """The original's own runs; None where nothing is to be checked."""
    return None if options["check"] == "none" else reference_with(session, full=options["check"] == "full")


def reference_with(session: Session, *, full: bool) -> Reference:
    """The original's own runs: on batches of 1, 2 and 3 with `full`, else on one input."""
    from bntool.checking import seeded_batches
    from bntool.reference import Reference

    batches = (1, 2, 3) if full else (1,)
    return Reference(session.model, seeded_batches(session.example, batches, session.seed))


def require_device(device: str, *, torch_too: bool = False, onnx_too: bool = False) -> None:
    """Before any work: CUDA that is asked for must be there. Raises `DeviceError` with the reasons."""
    if device in ("auto", "cpu"):
        return
    import torch

    from bntool.runtime.providers import GPU_EXTRA, why_no_cuda
    from bntool.runtime.torch_runner import require_torch_device

    if torch_too:
        try:
            require_torch_device(device)
        except DeviceError as error:
            reason = why_no_cuda()
            where = "; ".join(filter(None, (error.where, reason)))
            raise DeviceError(error.what, where=where, next_step=error.next_step) from error
        index, count = torch.device(device).index or 0, torch.cuda.device_count()
        if index >= count:
            found = f"torch finds {count} CUDA device(s)"
            raise DeviceError(f"there is no {device}", where=found, next_step="use --device cuda")
    reason = why_no_cuda() if onnx_too else ""
    if reason:
        what = "CUDA was asked for, but ONNX Runtime cannot use it"
        raise DeviceError(what, where=reason, next_step=GPU_EXTRA)


def torch_device(device: str) -> str:
    """Where torch checks: CUDA if it was asked for or is there, else the CPU. `DeviceError` if it cannot."""
    import torch

    from bntool.runtime.torch_runner import require_torch_device

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require_torch_device(device)
    return device


def proved(session: Session, reference: Reference, options: dict[str, Any]) -> SurgeryResult:
    """The fold, proved: torch against torch, and in float64 on inputs of other sizes."""
    from bntool import api

    with session.voice.progress("proving the fold") as step:
        return api.fold_proved(
            session.model,
            session.observe(),
            reference,
            include=options["include"] or ("*",),
            exclude=options["exclude"],
            merge=not options["no_merge"],
            unshare=options["unshare"],
            device=torch_device(options["device"]),
            progress=step,
            atol=options["atol"],
            rtol=options["rtol"],
        )


@contextlib.contextmanager
def exported(
    session: Session,
    result: SurgeryResult,
    reference: Reference | None,
    target: Path | None,
    options: dict[str, Any],
) -> Iterator[tuple[SurgeryResult, ExportResult | None]]:
    """Export beside the target, verify there, and move into place only when the block is done.

    Yields the result with its new checks, and what was exported (None without a target).
    """
    if target is None:
        yield result, None
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(
            f"cannot write beside {target}: {error.strerror}", next_step="name another -o OUTPUT"
        ) from error
    try:
        export = _export(session, result, folder / target.name, options, not options.get("no_merge", True))
        try:
            checks = _check_onnx(session, result, reference, export.path, options)
        except CheckFailed as failure:
            if not export.merged:
                raise
            session.voice.note(f"parallel branches are left as they are: {failure.what}")
            export = _export(session, result, folder / target.name, options, False)
            checks = _check_onnx(session, result, reference, export.path, options)
        from bntool import api

        result = api.with_checks(result, [*result.checks, *checks])
        placed = dataclasses.replace(
            export,
            path=target,
            data_path=target.with_name(export.data_path.name) if export.data_path else None,
        )
        yield result, placed
        if export.data_path is not None and placed.data_path is not None:
            export.data_path.replace(placed.data_path)
        export.path.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _export(
    session: Session, result: SurgeryResult, path: Path, options: dict[str, Any], merge: bool
) -> ExportResult:
    from bntool.exporting import export_onnx
    from bntool.onnx_folding import fold_exported
    from bntool.reasons import Reason
    from bntool.results import unshared_text

    metadata = {
        "bntool_version": __version__,
        "bntool_source_sha256": session.loaded.source_hash,
        "bntool_folded": ",".join(site.bn for site in result.plan.fold_sites),
        "bntool_kept": ",".join(f"{skip.name}:{skip.reason}" for skip in result.skips),
    }
    with session.voice.progress("exporting to ONNX"):
        export = export_onnx(
            result.model,
            session.example,
            path,
            opset=options["opset"],
            dynamic_batch=not options["static_batch"],
            metadata={k: v for k, v in metadata.items() if v},
        )
        if options.get("export_to"):
            stay = (Reason.EXCLUDED, Reason.NOT_PROVED)
            keep = [skip.name for skip in result.skips if skip.reason in stay]
            export = fold_exported(export, keep, merge=merge, unshare=options["unshare"])
    for name, layers in export.folded.items():
        session.voice.note(f"{name} is folded in the ONNX graph, into {', '.join(layers)}")
    if export.merged:
        first, branches = next(iter(export.merged.items()))
        session.voice.note(
            f"{len(export.merged)} convolutions of the ONNX graph are merged branches, "
            f"the first: {first} of {len(branches)} parallel convolutions"
        )
    if export.unshared.layers:
        session.voice.note(f"{unshared_text(export.unshared)}, in the ONNX graph")
    for note in export.notes:
        session.voice.note(note)
    return export


def _check_onnx(
    session: Session,
    result: SurgeryResult,
    reference: Reference | None,
    path: Path,
    options: dict[str, Any],
) -> list[Check]:
    """The export and runtime stages; a check that fails leaves no file."""
    from bntool.checking import check_onnx

    if reference is None:
        return []
    with session.voice.progress("verifying the ONNX file") as step:
        checks = check_onnx(
            result.model,
            path,
            reference.inputs,
            device=options["device"],
            progress=step,
            reference=reference,
            atol=options["atol"],
            rtol=options["rtol"],
        )
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        session.voice.say(checks_text([*result.checks, *checks]))
        raise CheckFailed(
            f"the {failed.stage} stage differs: "
            f"relative error {failed.relative:.2g}, allowed {failed.limit:.2g}",
            where=f"output {failed.worst[0]} on {failed.provider} ({failed.device})",
            next_step="see the table above; nothing was written",
        )
    return checks


def export_text(export: ExportResult) -> str:
    """The file, its size, and what it needs to be loaded."""
    total = export.path.stat().st_size + (export.data_path.stat().st_size if export.data_path else 0)
    nodes = sum(export.nodes.values())
    left = export.nodes.get("BatchNormalization", 0)
    batch_norms = f"{left} BatchNormalization" if left else "no BatchNormalization"
    return (
        f"{export.path} ({size(total)}, opset {export.opset}, IR {export.ir_version}, "
        f"{nodes} nodes, {batch_norms})"
    )
