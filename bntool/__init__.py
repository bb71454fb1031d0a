"""BatchNorm surgery for PyTorch models: insert it, summarise it, fold it, export and verify.

Public names are loaded on first use, so that `import bntool` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntool.core.lazy import loading
from bntool.core.version import __version__

if TYPE_CHECKING:
    from bntool.api import (
        apply,
        bench,
        export_onnx,
        fold,
        fold_to_onnx,
        insert,
        load,
        open_batches,
        plan_fold,
        plan_insert,
        read_plan,
        summary,
        verify,
    )
    from bntool.calibrating.calibrating import CalibrationResult, calibrate
    from bntool.core.errors import (
        BntoolError,
        CheckFailed,
        DamagedPlan,
        DeviceError,
        ExportError,
        LoadError,
        NothingToDo,
        ObserveError,
        PlanError,
        StateError,
        UsageError,
    )
    from bntool.core.options import CheckOptions, ExportOptions, FoldOptions, InsertOptions
    from bntool.core.plan import Plan
    from bntool.core.reasons import Reason
    from bntool.core.sites import DroppedBias, Edit, FoldSite, InsertSite, Skip
    from bntool.core.verdicts import Check
    from bntool.experiment.training_arms import compare
    from bntool.files.loaded import Loaded
    from bntool.results.checks import Comparison
    from bntool.results.results import SurgeryResult
    from bntool.results.summary import Summary
    from bntool.surgery.converting import convert_state_dict

_HOMES = {
    "api": """apply bench export_onnx fold fold_to_onnx insert load open_batches plan_fold plan_insert
        read_plan summary verify""",
    "calibrating.calibrating": "CalibrationResult calibrate",
    "experiment.training_arms": "compare",
    "surgery.converting": "convert_state_dict",
    "core.errors": """BntoolError CheckFailed DamagedPlan DeviceError ExportError LoadError NothingToDo
        ObserveError PlanError StateError UsageError""",
    "files.loaded": "Loaded",
    "core.options": "CheckOptions ExportOptions FoldOptions InsertOptions",
    "core.plan": "Plan",
    "core.sites": "DroppedBias Edit FoldSite InsertSite Skip",
    "core.reasons": "Reason",
    "results.checks": "Comparison",
    "results.summary": "Summary",
    "results.results": "SurgeryResult",
    "core.verdicts": "Check",
}

__all__ = [
    "BntoolError",
    "CalibrationResult",
    "Check",
    "CheckFailed",
    "CheckOptions",
    "Comparison",
    "DamagedPlan",
    "DeviceError",
    "DroppedBias",
    "Edit",
    "ExportError",
    "ExportOptions",
    "FoldOptions",
    "FoldSite",
    "InsertOptions",
    "InsertSite",
    "LoadError",
    "Loaded",
    "NothingToDo",
    "ObserveError",
    "Plan",
    "PlanError",
    "Reason",
    "Skip",
    "StateError",
    "Summary",
    "SurgeryResult",
    "UsageError",
    "__version__",
    "apply",
    "bench",
    "calibrate",
    "compare",
    "convert_state_dict",
    "export_onnx",
    "fold",
    "fold_to_onnx",
    "insert",
    "load",
    "open_batches",
    "plan_fold",
    "plan_insert",
    "read_plan",
    "summary",
    "verify",
]


__getattr__ = loading(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
