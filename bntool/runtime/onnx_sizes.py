"""Sizes of an ONNX file's values, seen in runs of it: what no inference tells where sizes are computed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator

from bntool.core.errors import BntoolError
from bntool.graph.inputs import Inputs
from bntool.observe.onnx_constants import to_onnx
from bntool.runtime.providers import onnxruntime

_STEM = "bntool.size_of."
_SILENT = 4
Shape = tuple[int, ...]


class SeenSizes:
    """What runs of a model tell, on inputs of several sizes that it takes.

    Args:
        model: the model; only values of its main graph are looked at.
        inputs: gives the inputs of the runs, each of other sizes where the file leaves any open. It is asked
            once, and only where something is to be seen.
        asked: whether the user said of what sizes they are.
    """

    def __init__(
        self, model: ir.Model, inputs: Callable[[], Sequence[Inputs]], *, asked: bool = False
    ) -> None:
        self._model, self._draw, self.asked = model, inputs, asked
        self._inputs: Sequence[Inputs] | None = None

    def lengths(self, which: int) -> Mapping[str, Shape]:
        """The shape of every input in a run; nothing where the model takes none that can be made up."""
        inputs = self._of(which)
        return {} if inputs is None else {n: tuple(t.shape) for n, t in inputs.tensors().items()}

    def shapes(self, which: int, names: Sequence[str]) -> Mapping[str, Shape]:
        """The shape of each of these values in a run, as far as there is one to be seen."""
        inputs = self._of(which)
        proto = None if inputs is None else self._asking(names)
        if inputs is None or proto is None:
            return {}
        fed = {name: to_onnx(tensor, name).numpy() for name, tensor in inputs.tensors().items()}
        wanted = [f"{_STEM}{name}" for name in names]
        # a help only: what is not seen stays unknown, and nothing moves there
        for run in (self._in_onnxruntime, _in_reference):
            with contextlib.suppress(Exception):
                found = run(proto, fed, wanted)
                return {name: tuple(int(n) for n in shape) for name, shape in zip(names, found, strict=True)}
        return {}

    def _of(self, which: int) -> Inputs | None:
        if self._inputs is None:
            try:
                self._inputs = self._draw()
            except BntoolError:
                self._inputs = ()
        return self._inputs[min(which, len(self._inputs) - 1)] if self._inputs else None

    def _asking(self, names: Sequence[str]) -> onnx.ModelProto | None:
        """The model with the shapes of some values as its only outputs."""
        try:
            proto = ir.serde.serialize_model(self._model)
        except ValueError:
            return None  # its own numbers are too many for one message
        del proto.graph.output[:]
        for name in names:
            proto.graph.node.append(helper.make_node("Shape", [name], [f"{_STEM}{name}"]))
            info = helper.make_tensor_value_info(f"{_STEM}{name}", onnx.TensorProto.INT64, [None])
            proto.graph.output.append(info)
        return proto

    def _in_onnxruntime(self, proto: onnx.ModelProto, fed: Any, wanted: Sequence[str]) -> list[Any]:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = _SILENT
        folders = {
            str(v.const_value.base_dir)
            for v in self._model.graph.initializers.values()
            if isinstance(v.const_value, ir.ExternalTensor)
        }
        if len(folders) > 1:
            raise ValueError("its data lie in several folders")
        for folder in folders:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        cpu = ["CPUExecutionProvider"]
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=cpu)
        taken = {info.name for info in session.get_inputs()}
        return list(session.run(list(wanted), {n: a for n, a in fed.items() if n in taken}))


def _in_reference(proto: onnx.ModelProto, fed: Any, wanted: Sequence[str]) -> list[Any]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(proto).run(list(wanted), fed))
