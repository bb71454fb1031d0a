"""A surgery from one ONNX file to another, and the fold of what an exported graph alone lets fold."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from bntool.core.options import FoldOptions, InsertOptions
from bntool.export.exporting import ExportResult
from bntool.export.onnx_cleaning import census
from bntool.files.onnx_files import open_onnx, put_onnx, write_drafts
from bntool.files.targets import Target
from bntool.pipeline.surgeries import fold, insert
from bntool.results.results import SurgeryResult
from bntool.subjects.base import Checking
from bntool.subjects.onnx import OnnxSubject, plan_fold_onnx
from bntool.surgery.fold_onnx import apply_fold_onnx

__all__ = ["fold_exported", "fold_onnx", "insert_onnx", "plan_fold_onnx"]


def fold_onnx(
    path: str | Path,
    output: str | Path | None,
    *,
    check: Literal["full", "fast", "none"] = "fast",
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
    **options: Any,
) -> SurgeryResult:
    """Fold every BatchNorm of an ONNX file that algebra allows, and write the result to `output`.

    Args:
        path: the file; patterns of `include` and `exclude` match names of its nodes.
        output: where the result goes; None for nowhere. Nothing is written where nothing folds.
        check: both files run in ONNX Runtime on two inputs (`full`: three) of different sizes where the file
            leaves axes open; a BatchNorm whose fold does not stand up stays, as `not-proved`.
        device: where the optimised file runs, or the names of providers.
        seed: of the inputs.
        force: whether `output` may be replaced.
        options: those of `FoldOptions`.

    Raises:
        LoadError: the file, or its external data, cannot be read or is not valid.
        UsageError: `output` exists without `force`, is the input, or cannot be written.
        StateError: a BatchNorm holds statistics such as NaN, so that nothing can be compared.
        CheckFailed: the folded file does not compute the same, and no BatchNorm of it is at fault.
        ExportError: ONNX Runtime cannot run the file as it was.
    """
    checking = Checking(full=check == "full", onnx_device=device, seed=seed)
    chosen = FoldOptions.of(options)

    def folded(subject: OnnxSubject) -> tuple[SurgeryResult, OnnxSubject]:
        return fold(subject, chosen, None if check == "none" else subject.proof(checking))

    return _from_file_to_file(path, output, folded, force=force)


def insert_onnx(
    path: str | Path, output: str | Path | None, options: InsertOptions | None = None, *, force: bool = False
) -> SurgeryResult:
    """Put a BatchNormalization node between every convolution of an ONNX file and its activation.

    γ = 1, β = 0, μ = 0, σ² = 1 - ε: the output stays the same. Nothing is written where there is no site, or
    where `output` is None.

    Raises:
        LoadError: the file, or its external data, cannot be read or is not valid.
        UsageError: an option that only modules can carry out; an `output` that cannot be written.
    """
    return _from_file_to_file(
        path, output, lambda subject: insert(subject, options or InsertOptions()), force=force
    )


def _from_file_to_file(
    path: str | Path,
    output: str | Path | None,
    surgery: Callable[[OnnxSubject], tuple[SurgeryResult, OnnxSubject]],
    *,
    force: bool,
) -> SurgeryResult:
    target = Target(force=force, reads=open_onnx(path).files)
    if output is None:
        result, _ = surgery(OnnxSubject(path))
        return dataclasses.replace(result, model=None)
    claimed = target.claim(output)
    with target.drafts() as drafts:
        result, after = surgery(OnnxSubject(path, folder=drafts.folder_for(claimed)))
        if not result.modified:
            return dataclasses.replace(result, model=None)
        put_onnx(after.model, after.data, claimed, drafts)
    return dataclasses.replace(result, model=claimed, data_path=drafts.part_of(claimed))


def fold_exported(
    export: ExportResult, keep: Sequence[str] = (), *, merge: bool = True, unshare: bool = False
) -> ExportResult:
    """Fold what a module tree cannot express, in the file just exported.


    That is functional BatchNorms; with `merge`, parallel branches that are one convolution; with `unshare`, a
    layer that one place calls several times. `keep` names the BatchNorms of the module that must stay; their
    nodes are named `name/Op`.
    """
    has_norms = bool(export.nodes.get("BatchNormalization"))
    if not has_norms and not (merge and export.nodes.get("Conv", 0) > 1):
        return export
    if not has_norms and not _has_parallel_convolutions(ir.load(export.path)):
        return export
    file = open_onnx(export.path)
    excluded = [f"{glob.escape(name)}/*" for name in keep]
    plan, observed = plan_fold_onnx(file.model, exclude=excluded, merge=merge, unshare=unshare)
    if not plan:
        return export
    apply_fold_onnx(observed, plan)
    folded = {site.bn: site.into for site in plan.fold_sites}
    merged = {m.layer: tuple(b.layer for b in m.branches if b.layer) for m in plan.merges}
    if folded:
        file.model.metadata_props["bntool_folded_in_graph"] = ",".join(folded)
    if merged:
        file.model.metadata_props["bntool_merged_in_graph"] = ",".join(merged)
    target = Target(force=True)
    path = target.claim(export.path)
    with target.drafts() as drafts:
        write_drafts(file, path, drafts)
    nodes = dict(sorted(census(file.model).items()))
    data_path = drafts.part_of(path)
    return dataclasses.replace(
        export, nodes=nodes, folded=folded, merged=merged, data_path=data_path, unshared=plan.unshared
    )


def _has_parallel_convolutions(model: ir.Model) -> bool:
    """Whether two convolutions of one value may meet in a sum: without a BatchNorm, only such can merge."""
    meeting: dict[ir.Value | None, dict[ir.Node, ir.Value | None]] = {}
    for node in model.graph:
        if node.op_type == "Conv":
            meeting[node.outputs[0]] = {node: node.inputs[0]}
        elif node.op_type in _LINEAR:
            found = {conv: source for value in node.inputs for conv, source in meeting.get(value, {}).items()}
            if len(set(found.values())) < len(found) or len(found) > _MANY_BRANCHES:
                return True
            meeting[node.outputs[0]] = found
    return False


_MANY_BRANCHES = 32
"""Of more the planner decides: each step of a long chain of sums would look at all of them."""
_LINEAR = frozenset("Add Sum Sub Mul Div Neg Identity Cast Dropout AveragePool Pad Reshape".split())
"""What a sum of branches may lead through."""
