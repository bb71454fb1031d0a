"""Check, export and verify, for the commands that end in a file that will be served."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bntool import __version__
from bntool.cli import devices
from bntool.cli.session import Session
from bntool.errors import CheckFailed, ExportError, UsageError
from bntool.report.checks import checks_text
from bntool.report.tables import size

if TYPE_CHECKING:
    from bntool.exporting import ExportResult
    from bntool.files.targets import Drafts, Target
    from bntool.inputs import Inputs
    from bntool.reference import Reference
    from bntool.results import SurgeryResult
    from bntool.verdicts import Check


@dataclasses.dataclass(frozen=True)
class OnnxPlace:
    """Where an ONNX file goes: as the user named it, and really; whether one that fails its check is kept."""

    named: Path
    path: Path
    keep_unverified: bool = False


def chosen_onnx(path: Path, target: Target, options: dict[str, Any]) -> OnnxPlace:
    """The ONNX file, after making sure that it may be written."""
    return OnnxPlace(path, target.claim(path), options["keep_unverified"])


def reference_of(session: Session, options: dict[str, Any]) -> Reference | None:
    """The original's own runs; None where nothing is to be checked."""
    if options["check"] == "none":
        return None
    return reference_with(session, full=options["check"] == "full", dynamic=options["dynamic"])


def reference_with(session: Session, *, full: bool, dynamic: dict[str, list[int]] | None = None) -> Reference:
    """The original's own runs: on batches of 1, 2 and 3 with `full`, else on one input."""
    from bntool.checking import seeded_batches
    from bntool.reference import Reference

    batches = (1, 2, 3) if full else (1,)
    inputs = seeded_batches(session.example, batches, session.seed)
    return Reference(session.model, [*inputs, *_longer(session, dynamic or {})])


def _longer(session: Session, dynamic: dict[str, list[int]]) -> list[Inputs]:
    """An input on which the axes that are to be open are longer: by 32, which most strides divide."""
    from bntool.dynamic_axes import resized

    axes = {name: [axis for axis in of if axis] for name, of in dynamic.items()}
    axes = {name: of for name, of in axes.items() if of}
    return [resized(session.example, axes, by=32, seed=session.seed)] if axes else []


def require_axes(session: Session, options: dict[str, Any]) -> None:
    """Before any work: the options of the export fit each other, and every axis to leave open is there."""
    from bntool.dynamic_axes import DynamicAxes

    if options["keep_io"] and not narrow(options["dtype"]):
        raise UsageError("--keep-io goes with --dtype", next_step="add --dtype fp16, or leave --keep-io out")
    session.observe()
    DynamicAxes(asked=options["dynamic"]).named_for(session.example)


def proved(session: Session, reference: Reference, options: dict[str, Any]) -> SurgeryResult:
    """The fold, proved: torch against torch, and in float64 on inputs of other sizes."""
    from bntool import surgeries

    chosen: dict[str, Any] = {
        "include": options["include"] or ("*",),
        "exclude": options["exclude"],
        "merge": not options["no_merge"],
        "unshare": options["unshare"],
    }
    try:
        with session.voice.progress("proving the fold") as step:
            return surgeries.fold_proved(
                session.model,
                session.observe(),
                reference,
                **chosen,
                device=devices.torch_device(options["device"]),
                progress=step,
                atol=options["atol"],
                rtol=options["rtol"],
            )
    except CheckFailed:
        from bntool.blaming import blame_modules
        from bntool.cli import blaming

        folded = surgeries.fold_observed(session.model, session.observe(), **chosen).model
        blaming.report(
            session.voice,
            lambda: blame_modules(session.model, folded, reference.inputs, stage="fold"),
            options,
        )
        raise


def exported(
    session: Session,
    result: SurgeryResult,
    reference: Reference | None,
    onnx: OnnxPlace | None,
    drafts: Drafts,
    options: dict[str, Any],
) -> tuple[SurgeryResult, ExportResult | None]:
    """Export into a draft and verify it there; the result with its new checks, and what was exported.

    The file goes to its place with the other drafts. Nothing is exported where there is no place for it.
    """
    if onnx is None:
        return result, None
    from bntool import surgeries
    from bntool.onnx_files import put_onnx
    from bntool.onnx_writing import append_metadata

    draft = drafts.folder_for(onnx.path) / onnx.path.name
    with keeping_unverified(draft, onnx):
        export, checks = _exported_and_checked(session, result, reference, draft, options)
    result = surgeries.with_checks(result, [*result.checks, *checks])
    append_metadata(export.path, {"bntool_checks": _told(result.checks)})
    put_onnx(export.path, export.data_path, onnx.path, drafts)
    return result, export


@contextlib.contextmanager
def keeping_unverified(draft: Path, onnx: OnnxPlace) -> Iterator[None]:
    """Where the check of a draft fails, keep it if the user asked for that, under a name that says so."""
    from bntool.onnx_files import open_onnx, save_onnx

    try:
        yield
    except (CheckFailed, ExportError) as error:
        error.where = error.where.replace(str(draft), str(onnx.named))
        if onnx.keep_unverified and draft.exists():
            names = (onnx.named.with_suffix(f".unverified{(n and f'.{n}') or ''}.onnx") for n in range(1000))
            kept = next(name for name in names if not os.path.lexists(name))
            save_onnx(open_onnx(draft), kept)
            error.next_step = f"kept as {kept}: do not serve it"
        raise


def placed(export: ExportResult | None, onnx: OnnxPlace | None, drafts: Drafts) -> ExportResult | None:
    """What was exported, where it stands now."""
    if export is None or onnx is None:
        return None
    return dataclasses.replace(export, path=onnx.named, data_path=drafts.part_of(onnx.path))


def _exported_and_checked(
    session: Session,
    result: SurgeryResult,
    reference: Reference | None,
    path: Path,
    options: dict[str, Any],
) -> tuple[ExportResult, list[Check]]:
    export = exported_file(session, result, path, options, merge=not options.get("no_merge", True))
    try:
        return export, _check_onnx(session, result, reference, path, options, blame=not export.merged)
    except CheckFailed as failure:
        if not export.merged:
            raise
        session.voice.note(f"parallel branches are left as they are: {failure.what}")
    export = exported_file(session, result, path, options, merge=False)
    return export, _check_onnx(session, result, reference, path, options)


def exported_file(
    session: Session, result: SurgeryResult, path: Path, options: dict[str, Any], *, merge: bool
) -> ExportResult:
    """The model as an ONNX file; on the way to being served, with what the graph itself lets fold."""
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
            ir_version=options["ir_version"],
            dynamic_batch=not options["static_batch"],
            dynamic=options["dynamic"],
            external_data=options["external_data"],
            dtype=narrow(options["dtype"]),
            keep_io=options["keep_io"],
            exporter=options["exporter"],
            metadata={k: v for k, v in metadata.items() if v},
            force=True,  # a draft, which a first try may have left
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
    *,
    blame: bool = True,
) -> list[Check]:
    """The export and runtime stages. Raises `CheckFailed`, or `ExportError` for a file that does not run.

    Without `blame`, or in half precision, nobody looks for the node at fault.
    """
    from bntool.casting import DTYPES, stored_as
    from bntool.checking import check_onnx
    from bntool.verdicts import first_failed

    if reference is None:
        return []
    dtype = DTYPES.get(narrow(options["dtype"]))
    if dtype is not None:
        reference = reference.in_arithmetic(stored_as(dtype))
    try:
        with session.voice.progress("verifying the ONNX file") as step:
            checks = check_onnx(
                result.model,
                path,
                reference.inputs,
                device=options["onnx_device"],
                progress=step,
                reference=reference,
                tf32=options["tf32"] == "both",
                atol=options["atol"],
                rtol=options["rtol"],
            )
    except ExportError as error:
        if dtype is not None:
            error.next_step = "verify on a device that runs it (--device cuda), or write it with --check none"
        raise
    failed = first_failed(checks)
    if failed is not None:
        session.voice.say(checks_text([*result.checks, *checks]))
        if blame and dtype is None:
            from bntool.blaming import blame_onnx
            from bntool.cli import blaming

            found = partial(blame_onnx, result.model, path, reference.inputs, checks)
            blaming.report(session.voice, found, options)
        raise CheckFailed(
            f"the {failed.stage} stage differs: {failed.figures}",
            where=f"output {failed.worst[0]} on {failed.provider} ({failed.device})",
            next_step="see the table above; nothing was written",
        )
    return checks


def narrow(dtype: str | None) -> Literal["", "fp16", "bf16"]:
    """The type to cast the ONNX file to, if it is one for that; float32 is for the model itself."""
    return "fp16" if dtype == "fp16" else "bf16" if dtype == "bf16" else ""


def _told(checks: Sequence[Check]) -> str:
    """The verdicts for the file's metadata, without figures: those wobble from machine to machine."""
    rows = [f"{c.stage} {c.precision}".strip() + f": passed on {c.provider}" for c in checks if c.decides]
    return "; ".join(rows) or "none"


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
