"""Insert identity BatchNormalization nodes into an ONNX file, for tools that re-estimate on ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bntool.files.targets import Target
from bntool.inserting import InsertOptions, plan_insert_nodes
from bntool.observe.onnx_model import observe_onnx
from bntool.onnx_files import open_onnx, save_onnx
from bntool.plan import ByPlan, Plan
from bntool.surgery.insert_onnx import apply_insert_onnx


@dataclasses.dataclass(frozen=True)
class OnnxInsertResult(ByPlan):
    """The plan, and the files written (None where nothing was)."""

    plan: Plan
    path: Path | None = None
    data_path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_dict(), "path": str(self.path) if self.path else None}


def insert_onnx(
    path: str | Path, output: str | Path | None, options: InsertOptions | None = None, *, force: bool = False
) -> OnnxInsertResult:
    """Put a BatchNormalization node between every convolution of an ONNX file and its activation.

    γ = 1, β = 0, μ = 0, σ² = 1 − ε: the output stays the same. Nothing is written where there is no site, or
    where `output` is None.

    Raises:
        LoadError: the file, or its external data, cannot be read or is not valid.
        UsageError: an option that only modules can carry out; an `output` that cannot be written.
    """
    file = open_onnx(path)
    if output is not None:
        Target(force=force, reads=file.files).claim(output)
    observed = observe_onnx(file.model)
    plan = plan_insert_nodes(observed.graph, options or InsertOptions())
    apply_insert_onnx(observed, plan)
    if output is None or not plan:
        return OnnxInsertResult(plan)
    written, data = save_onnx(file, output, force=force)
    return OnnxInsertResult(plan, written, data)
