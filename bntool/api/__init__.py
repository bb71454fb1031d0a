"""The public functions. Each takes a model of any kind, and is one pass: observe, plan, apply, check.

They are loaded when they are asked for: a fold of a module needs no ONNX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bntool.core.lazy import loading

if TYPE_CHECKING:
    from bntool.api.looking import summary
    from bntool.api.plans import apply, read_plan
    from bntool.api.reading import load, open_batches
    from bntool.api.serving import export_onnx, exported, fold_to_onnx, verify
    from bntool.api.surgery import fold, insert, plan_fold, plan_insert
    from bntool.api.timing import bench

_HOMES = {
    "looking": "summary",
    "plans": "apply read_plan",
    "reading": "load open_batches",
    "serving": "export_onnx exported fold_to_onnx verify",
    "surgery": "fold insert plan_fold plan_insert",
    "timing": "bench",
}

__all__ = [
    "apply",
    "bench",
    "export_onnx",
    "exported",
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
