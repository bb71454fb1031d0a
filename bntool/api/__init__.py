"""The public functions. Each takes a model of any kind, and is one pass: observe, plan, apply, check.

They are loaded when they are asked for: a fold of a module needs no ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
