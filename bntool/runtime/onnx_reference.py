"""Run an ONNX file with ONNX's own reference implementation, where ONNX Runtime cannot."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bntool.core.errors import ExportError
from bntool.files.onnx_data import whole_proto
from bntool.files.onnx_forms import to_one_form
from bntool.graph.inputs import Inputs
from bntool.observe.onnx_constants import to_onnx, to_torch
from bntool.runtime.libraries import first_line
from bntool.runtime.runner import fits


class ReferenceRunner:
    """Slow, and for every type of number and the newest opset: float64, bfloat16.

    Before opset 14 it takes a BatchNormalization's statistics from the batch. Raises `ExportError` when the
    file is refused.
    """

    device: str = "cpu"
    provider: str = "onnx.reference"
    note: str = "ONNX Runtime cannot run this file"

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            model = whole_proto(self._path)
            to_one_form(model)
            self._evaluator = ReferenceEvaluator(model)
        except Exception as error:  # whatever an op's implementation raises
            raise self._refused("does not know the file", error) from error
        stored = {tensor.name for tensor in model.graph.initializer}
        self._inputs = [info for info in model.graph.input if info.name not in stored]
        self._outputs = [info.name for info in model.graph.output]

    @property
    def label(self) -> str:
        return f"ONNX's reference implementation {self._path.name}"

    @property
    def signature(self) -> list[tuple[str, str, list[int | str | None]]]:
        """Name, type and axes of every input, in ONNX Runtime's words."""
        return [(info.name, _kind(info.type), _axes(info.type.tensor_type)) for info in self._inputs]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(info.name for info in self._inputs)

    def accepts(self, inputs: Inputs) -> bool:
        """Whether every fixed axis of the file's inputs has the length that these inputs have."""
        given = inputs.tensors()
        return given.keys() >= set(self.input_names) and all(
            fits(axes, tuple(given[name].shape)) for name, _, axes in self.signature
        )

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Every output by name. Raises `ExportError` when the file does not run."""
        fed = {name: to_onnx(tensor, name).numpy() for name, tensor in inputs.tensors().items()}
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = self._evaluator.run(None, fed)
        except Exception as error:  # whatever an op's implementation raises
            raise self._refused(f"cannot run the file on {inputs.shapes()}", error) from error
        found = {name: to_torch(np.asarray(r)) for name, r in zip(self._outputs, results, strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _refused(self, what: str, error: Exception) -> ExportError:
        return ExportError(
            f"ONNX's reference implementation {what}: {first_line(error)}", where=str(self._path)
        )


def _kind(told: onnx.TypeProto) -> str:
    if not told.HasField("tensor_type"):
        return str(told.WhichOneof("value"))
    name = onnx.TensorProto.DataType.Name(told.tensor_type.elem_type).lower()
    return f"tensor({name})"


def _axes(told: Any) -> list[int | str | None]:
    dims = told.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
