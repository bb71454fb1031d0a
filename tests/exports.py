"""A model written as ONNX, and all that is found out; options by name, as `bntool.export_onnx` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bntool.core.options import ExportOptions
from bntool.export import exporting
from bntool.export.exporting import ExportResult


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    **options: Any,
) -> ExportResult:
    axes = tuple(f"{name}:{','.join(map(str, found))}" for name, found in (dynamic or {}).items())
    how = ExportOptions(static_batch=not dynamic_batch, dynamic=axes, **options)
    how.validate()
    how.require_together()
    return exporting.export_onnx(model, example_inputs, path, how, metadata=metadata, force=force)
