"""What each tool makes of a model: one function a tool, all of one form.

Every tool gets the same float32 model in eval mode, or the same unfolded ONNX file of it, and is asked for
what it offers for inference with no option set that a user would have to know of.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bntool.graph.inputs import Inputs, outputs_of
from tools.sweeps.fingerprints import Trace, trace_onnx, trace_openvino, trace_torch


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: how to make it, the inputs it runs on, and the unfolded ONNX file of it."""

    make: Callable[[], Any]
    inputs: Inputs
    unfolded: Path
    folder: Path

    @functools.cached_property
    def model(self) -> Any:
        return self.make()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tool's model computes per channel, and what it returned.

    `rest` is what the tool's own runtime returns where there is nothing left to fold: its own rounding.
    """

    trace: Trace
    outputs: dict[str, torch.Tensor]
    rest: dict[str, torch.Tensor] | None = None


def bntool_module(case: Case) -> Outcome:
    import bntool

    return _ran(bntool.fold(case.model, case.inputs).model, case.inputs)


def bntool_export(case: Case) -> Outcome:
    """What `bntool fold --export onnx` leaves: the module folded, exported, and the graph folded."""
    import bntool
    from bntool.api import exported
    from bntool.pipeline.onnx_folding import fold_exported

    folded = bntool.fold(case.model, case.inputs, share=True)
    return _read(fold_exported(exported(folded.model, case.inputs, case.folder / "bntool.onnx")).path, case)


def bntool_onnx(case: Case) -> Outcome:
    """What `bntool fold FILE.onnx` leaves."""
    from bntool.pipeline.onnx_folding import fold_onnx

    result = fold_onnx(case.unfolded, case.folder / "folded.onnx", force=True)
    return _read(result.path or case.unfolded, case)


def fx_fuse(case: Case) -> Outcome:
    from torch.fx.experimental.optimization import fuse

    return _ran(fuse(case.model), case.inputs)


def jit_freeze(case: Case) -> Outcome:
    traced = torch.jit.trace(
        case.model, case.inputs.args, example_kwarg_inputs=dict(case.inputs.kwargs) or None, strict=False
    )
    frozen = torch.jit.freeze(traced)
    with torch.jit.optimized_execution(False):  # no fusing at run time: the graph is what counts
        return _ran(frozen, case.inputs)


def exporter(case: Case) -> Outcome:
    path = case.folder / "default.onnx"
    program = torch.onnx.export(
        case.model, case.inputs.args, kwargs=dict(case.inputs.kwargs), dynamo=True, optimize=True
    )
    program.save(path)
    return _read(path, case)


def onnxsim(case: Case) -> Outcome:
    import onnx
    import onnxsim as tool

    path = case.folder / "onnxsim.onnx"
    onnx.save(tool.simplify(onnx.load(case.unfolded))[0], path)
    return _read(path, case)


def onnxslim(case: Case) -> Outcome:
    import onnx
    import onnxslim as tool

    path = case.folder / "onnxslim.onnx"
    onnx.save(tool.slim(onnx.load(case.unfolded)), path)
    return _read(path, case)


def onnxoptimizer(case: Case) -> Outcome:
    import onnx
    import onnxoptimizer as tool

    path = case.folder / "onnxoptimizer.onnx"
    onnx.save(tool.optimize(onnx.load(case.unfolded)), path)
    return _read(path, case)


def ort(case: Case) -> Outcome:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The level above is for one machine's layout only; ONNX Runtime itself advises against saving it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(case.folder / "ort.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(case.unfolded, options, providers=["CPUExecutionProvider"])
    return _read(case.folder / "ort.onnx", case)


def openvino(case: Case) -> Outcome:
    import openvino as tool

    from bntool.pipeline.onnx_folding import fold_onnx

    def run(model: Any) -> dict[str, torch.Tensor]:
        # float32, whatever the processor would like better: the fold is judged, not the precision
        compiled = tool.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results = compiled([tensor.numpy() for tensor in case.inputs.tensors().values()])
        return {f"{i}": torch.from_numpy(results[i].copy()) for i in range(len(compiled.outputs))}

    model = tool.convert_model(case.unfolded)
    # Nothing but its own runtime runs it, and that rounds by itself, folded or not: mobilevit_s differs by
    # 27 times the model's noise either way.
    folded = fold_onnx(case.unfolded, case.folder / "rest.onnx", force=True).path
    rest = run(tool.convert_model(folded)) if folded else None
    return Outcome(trace_openvino(model), run(model), rest)


BNTOOL = {
    "bntool": bntool_export,
    "bntool, module": bntool_module,
    "bntool, ONNX file": bntool_onnx,
}
PEERS = {
    "torch.fx": fx_fuse,
    "jit.freeze": jit_freeze,
    "exporter": exporter,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
    "ORT": ort,
    "OpenVINO": openvino,
}
TOOLS: dict[str, Callable[[Case], Outcome]] = {**BNTOOL, **PEERS}
ON_FILES: dict[str, Callable[[Case], Outcome]] = {
    "bntool": bntool_onnx,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
    "onnxoptimizer": onnxoptimizer,
    "ORT": ort,
    "OpenVINO": openvino,
}
"""What takes an ONNX file as it is."""

_PACKAGES = (
    "bntool torch torchvision timm onnx onnxscript onnxruntime-gpu onnxruntime onnxsim onnxslim "
    "onnxoptimizer openvino"
)


def versions() -> dict[str, str]:
    """The versions of everything that takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES.split():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _ran(model: Any, inputs: Inputs) -> Outcome:
    def run() -> Any:
        return model(*inputs.args, **dict(inputs.kwargs))

    with torch.no_grad():
        outputs = {name: tensor.clone() for name, tensor in outputs_of(run()).items()}
    return Outcome(trace_torch(run), outputs)


def _read(path: Path, case: Case) -> Outcome:
    """The file's trace, and its outputs in ONNX Runtime with every optimisation off."""
    from bntool.runtime.ort_runner import OrtRunner

    return Outcome(trace_onnx(path), OrtRunner(path, "cpu", optimize=False).run(case.inputs))
