"""The public functions. Each takes a model of any kind, and is one pass: observe, plan, apply, check."""

from bntool.api.looking import summary
from bntool.api.plans import apply, read_plan
from bntool.api.reading import load, open_batches
from bntool.api.serving import export_onnx, exported, fold_to_onnx, verify
from bntool.api.surgery import fold, insert, plan_fold, plan_insert
from bntool.api.timing import bench

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
