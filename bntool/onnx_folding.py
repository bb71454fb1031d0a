"""Fold the BatchNorms of an ONNX file: open, observe, plan, apply, check, save."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from bntool.comparing import Limit
from bntool.errors import CheckFailed, StateError
from bntool.exporting import ExportResult
from bntool.files.drafts import draft_folder
from bntool.files.targets import Target
from bntool.folding import at_graph_level, plan_on_all
from bntool.observe.onnx_model import OnnxObservation, observe_onnx
from bntool.onnx_checking import OnnxReference
from bntool.onnx_cleaning import census
from bntool.onnx_files import OnnxFile, open_onnx, put_onnx, save_onnx, write_drafts
from bntool.plan import ByPlan, Plan
from bntool.reasons import Reason
from bntool.settling import settle
from bntool.surgery.fold_onnx import OnnxCounts, apply_fold_onnx
from bntool.verdicts import Check


@dataclasses.dataclass(frozen=True)
class OnnxFoldResult(ByPlan):
    """The plan, what it changed in numbers, and the files written (None where nothing was)."""

    plan: Plan
    counts: OnnxCounts
    path: Path | None = None
    data_path: Path | None = None
    checks: tuple[Check, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "counts": dataclasses.asdict(self.counts),
            "unshared": self.plan.unshared.to_dict(),
            "path": str(self.path) if self.path else None,
            "data_path": str(self.data_path) if self.data_path else None,
            "checks": [check.to_dict() for check in self.checks],
        }


def fold_onnx(
    path: str | Path,
    output: str | Path | None,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    merge: bool = True,
    unshare: bool = False,
    check: Literal["full", "fast", "none"] = "fast",
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
) -> OnnxFoldResult:
    """Fold every BatchNorm of an ONNX file that algebra allows, and write the result to `output`.

    `include` and `exclude` match node names. With `merge`, parallel branches that are one convolution become
    one; where the check does not bear that out, they stay, and a note says so. With `unshare` a node that
    shares its weight with another gets an initializer of its own, where it needs one; `plan.unshared` says
    what that adds. Nothing is written where nothing folds, or where `output` is None. Names, metadata, opset,
    order and external data stay as they are. Both files run in ONNX Runtime on two inputs drawn from `seed`,
    of different sizes where the file leaves axes open (`check="full"`: three); a BatchNorm whose fold does
    not stand up stays, as `not-proved`.

    Raises:
        LoadError: the file, or its external data, cannot be read or is not valid.
        UsageError: `output` exists without `force`, is the input, or cannot be written.
        StateError: a BatchNorm holds statistics such as NaN, so that nothing can be compared.
        CheckFailed: the folded file does not compute the same, and no BatchNorm of it is at fault.
        ExportError: ONNX Runtime cannot run the file as it was.
    """
    path = Path(path)
    target = Target(force=force, reads=open_onnx(path).files)
    claimed = None if output is None else target.claim(output)
    observed: list[tuple[OnnxFile, OnnxObservation]] = []
    reference: list[OnnxReference] = []

    def plan_without(names: Sequence[str], merges: bool) -> Plan:
        file = open_onnx(path)
        plan, seen = plan_fold_onnx(file.model, include=include, exclude=names, merge=merges, unshare=unshare)
        observed[:] = [(file, seen)]
        return plan

    def proof(nodes: int) -> OnnxReference:
        """The file's own runs, which are made once there is something to prove."""
        if not reference:
            count = 3 if check == "full" else 2
            reference.append(OnnxReference(path, nodes, count=count, seed=seed))
        return reference[0]

    def carry_out(plan: Plan) -> OnnxFoldResult:
        file, seen = observed.pop()
        counts = apply_fold_onnx(seen, plan)
        if not plan or (output is None and check == "none"):
            return OnnxFoldResult(plan, counts)
        written, data = save_onnx(file, folder / (claimed or path).name, force=True)
        if check == "none":
            return OnnxFoldResult(plan, counts, written, data)
        require_good_statistics(plan, path)
        checks = tuple(proof(counts.nodes_before).checks(written, device=device))
        failed = next((row for row in checks if not row.passed), None)
        if failed is not None:
            raise _not_borne_out(failed, reference[0].redrawn_limits[failed.worst[0]])
        return OnnxFoldResult(plan, counts, written, data, checks)

    def agrees(part: Plan) -> bool:
        file = open_onnx(path)
        counts = apply_fold_onnx(observe_onnx(file.model), part)
        written, _ = save_onnx(file, folder / "part.onnx", force=True)
        return all(row.passed for row in proof(counts.nodes_before).checks(written, device=device))

    with target.drafts() as drafts, draft_folder(None) as elsewhere:
        folder = elsewhere if claimed is None else drafts.folder_for(claimed)
        plan, result = settle(plan_without, carry_out, agrees, exclude, merge)
        result = dataclasses.replace(result, plan=plan)
        if claimed is None or result.path is None:
            return dataclasses.replace(result, path=None, data_path=None)
        put_onnx(result.path, result.data_path, claimed, drafts)
    return dataclasses.replace(result, path=claimed, data_path=drafts.part_of(claimed))


def _not_borne_out(failed: Check, limit: Limit) -> CheckFailed:
    where = f"output {failed.worst[0]} on {failed.provider} ({failed.stage})"
    if limit.undecidable:
        return CheckFailed(
            f"the fold cannot be checked: {limit.undecidable}",
            where=where,
            next_step="fold it with --check none, and verify the result with inputs of your own",
        )
    return CheckFailed(
        f"the folded file differs: {failed.figures}",
        where=where,
        next_step="leave BatchNorms out with --exclude, and please report it",
    )


def require_good_statistics(plan: Plan, path: Path) -> None:
    """Raise `StateError`, naming the BatchNorm, where one holds statistics that no BatchNorm may hold."""
    bad = next((skip for skip in plan.skips if skip.reason is Reason.BAD_STATISTICS), None)
    if bad is not None:
        raise StateError(
            f"the statistics of BatchNorm {bad.name} are bad: {bad.detail}",
            where=str(path),
            next_step=f"export the model again, or leave it out with --exclude {bad.name}",
        )


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
