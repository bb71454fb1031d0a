"""Fold the BatchNorms of an ONNX file: open, observe, plan, apply, save."""

from __future__ import annotations

import dataclasses
import glob
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bntool.exporting import ExportResult
from bntool.files.atomic import require_writable
from bntool.folding import at_graph_level, plan_on_all
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.onnx_cleaning import census
from bntool.onnx_files import move_onnx, open_onnx, save_onnx
from bntool.plan import Plan
from bntool.surgery.fold_onnx import OnnxCounts, apply_fold_onnx


@dataclasses.dataclass(frozen=True)
class OnnxFoldResult:
    """The plan, what it changed in numbers, and the files written (None where nothing was)."""

    plan: Plan
    counts: OnnxCounts
    path: Path | None = None
    data_path: Path | None = None

    @property
    def modified(self) -> bool:
        return bool(self.plan)

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "counts": dataclasses.asdict(self.counts),
            "unshared": self.plan.unshared.to_dict(),
            "path": str(self.path) if self.path else None,
            "data_path": str(self.data_path) if self.data_path else None,
        }


def fold_onnx(
    path: str | Path,
    output: str | Path | None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    force: bool = False,
) -> OnnxFoldResult:
    """Fold every BatchNorm of an ONNX file that algebra allows, and write the result to `output`.

    `include` and `exclude` match node names. With `merge`, parallel branches that are one convolution become
    one. With `unshare` a node that shares its weight with another gets an initializer of its own, where it
    needs one; `plan.unshared` says what that adds. Nothing is written where nothing folds, or where `output`
    is None. Names, metadata, opset, order and external data stay as they are.

    Raises:
        LoadError: the file, or its external data, cannot be read or is not valid.
        UsageError: `output` exists without `force`, is the input, or cannot be written.
    """
    file = open_onnx(path)
    if output is not None:
        require_writable(output, force=force, forbid=(file.path, *file.data_files))
    plan, observed = plan_fold_onnx(
        file.model, include=include, exclude=exclude, merge=merge, unshare=unshare
    )
    counts = apply_fold_onnx(observed, plan)
    if output is None or not plan:
        return OnnxFoldResult(plan, counts)
    written, data = save_onnx(file, output, force=force)
    return OnnxFoldResult(plan, counts, written, data)


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
    file = open_onnx(export.path)
    if not has_norms and not _has_parallel_convolutions(file.model):
        return export
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
    with tempfile.TemporaryDirectory(dir=export.path.parent, prefix=".fold.") as folder:
        written, data = save_onnx(file, Path(folder) / export.path.name)
        move_onnx(written, data, export.path)
    nodes = dict(sorted(census(file.model).items()))
    data_path = export.path.with_name(data.name) if data is not None else None
    return dataclasses.replace(
        export, nodes=nodes, folded=folded, merged=merged, data_path=data_path, unshared=plan.unshared
    )


def _has_parallel_convolutions(model: ir.Model) -> bool:
    """Whether two convolutions read one value: without a BatchNorm, only such can merge."""
    sources = [node.inputs[0] for node in model.graph if node.op_type == "Conv"]
    return len(set(sources)) < len(sources)


def plan_fold_onnx(
    model: ir.Model,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
) -> tuple[Plan, OnnxObservation]:
    """A verdict for every BatchNorm of the model, and the observation it was planned on.

    Where an axis has no fixed size, a fold counts only if it comes out the same for two sets of sizes.
    """
    observed = observe_onnx(model)
    graphs = [observed.graph, *([observe_onnx(model, sizes=1).graph] if observed.open else [])]
    plan = plan_on_all(graphs, include=include, exclude=exclude, merge=merge, unshare=unshare)
    return at_graph_level(plan, observed.hidden), observed
